"""What was measured, as a table and as JSON; the figures have the names of a simulation's."""

from dataclasses import asdict
from typing import Any

from megatron_eso.benchmark.measurement import Measurement
from megatron_eso.quantities import GIB
from megatron_eso.simulation.report import (
    describe_step,
    format_collectives,
    format_communication,
    format_parts,
    format_sizes,
    format_waits,
)
from megatron_eso.simulation.stage import StepUse


def describe_measurement(measurement: Measurement) -> dict[str, Any]:
    """Return all figures of a measurement by name, in seconds and bytes."""
    # Time counts on the slowest rank, memory on the fullest.
    slowest, fullest = measurement.slowest, measurement.fullest
    inspection = slowest.inspection
    hours = measurement.median * measurement.num_steps / 3600
    seconds = measurement.step_seconds
    return {
        "simulated": False,
        "gpu": measurement.device,
        "world_size": len(measurement.ranks),
        "parameters_of_rank": slowest.num_parameters,
        "micro_batches": measurement.num_micro_batches,
        # The timed steps.
        "step_seconds": measurement.median,
        "step_seconds_spread": [min(seconds), max(seconds)],
        "timed_steps": len(seconds),
        "skipped_updates": slowest.num_skipped,
        "data_wait_seconds": max(slowest.data_seconds),
        "inspected_step_seconds": inspection.seconds,
        "tokens_per_second": measurement.tokens_per_second,
        "tokens_per_second_per_gpu": measurement.tokens_per_second / len(measurement.ranks),
        "hours": hours,
        "gpu_hours": hours * len(measurement.ranks),
        "mfu": measurement.utilizations,
        "measured_peak_flops": measurement.measured_peak,
        "memory": {
            "rank": fullest.rank,
            **asdict(fullest.memory),
            "largest": None if fullest.largest_memory is None else asdict(fullest.largest_memory),
            "between_steps": fullest.held,
        },
        **describe_step(_sum_step(measurement), inspection.collectives, inspection.waits),
        "unstated_operations": inspection.unstated,
    }


def format_measurement(measurement: Measurement) -> str:
    """Return the figures as a table for people."""
    slowest = measurement.slowest
    number, step = measurement.num_micro_batches, _sum_step(measurement)
    unstated = ", ".join(slowest.inspection.unstated)
    sections = [
        [f"measured: {len(measurement.ranks)} x {measurement.device}"],
        _format_memory(measurement),
        [
            f"kernels of rank {slowest.rank} in one more step; a step has {number} micro-batches",
            *format_parts(step),
            *([f"without TFLOP and GB of {unstated}"] if unstated else []),
        ],
        [*format_communication(step), *format_collectives(slowest.inspection.collectives)],
        format_waits(slowest.inspection.waits, number) if measurement.measured_peak else [],
        _format_result(measurement),
    ]
    return "\n".join("\n".join(lines) + "\n" for lines in sections if lines)


def _sum_step(measurement: Measurement) -> StepUse:
    """Return the inspected step of the slowest rank as one of equal micro-batches."""
    step = StepUse()
    step.add(measurement.slowest.inspection, measurement.num_micro_batches, 1.0)
    return step


def _format_memory(measurement: Measurement) -> list[str]:
    fullest = measurement.fullest
    memory, largest = fullest.memory, fullest.largest_memory
    rest = memory.peak - sum(fullest.held.values())
    if memory.reserved is None:
        return [
            f"memory of rank {fullest.rank}, GiB",
            *format_sizes({**fullest.held, "activations, libraries and the rest": rest}),
            f"{memory.peak / GIB:10.2f}  sum, the most that the process held",
        ]
    lines = [
        f"memory of rank {fullest.rank} at the peak of the timed steps, GiB",
        *format_sizes({**fullest.held, "activations and the rest": rest}),
        f"{memory.peak / GIB:10.2f}  sum; torch reserved {memory.reserved / GIB:.2f}",
    ]
    if largest is not None and largest.reserved is not None:
        lines.append(
            f"{largest.peak / GIB:10.2f}  with the largest micro-batch; torch reserved "
            f"{largest.reserved / GIB:.2f}"
        )
    return lines


def _format_result(measurement: Measurement) -> list[str]:
    seconds, slowest = measurement.step_seconds, measurement.slowest
    rate, num_ranks = measurement.tokens_per_second, len(measurement.ranks)
    mfu, lines = measurement.utilizations, []
    # Utilization, of a GPU only.
    if "of_published_peak" in mfu:
        lines.append(
            f"model FLOPs utilization: {mfu['of_published_peak']:.1%} of the published peak"
        )
    if measurement.measured_peak is not None:
        lines.append(
            f"model FLOPs utilization: {mfu['of_measured_peak']:.1%} of the "
            f"{measurement.measured_peak / 1e12:,.0f} TFLOP/s that a large bf16 matrix product "
            f"reaches"
        )
    if slowest.num_skipped:
        lines.append(f"{slowest.num_skipped} of {len(seconds)} timed steps skipped their update")
    # Time and speed.
    lines += [
        f"a step: {measurement.median:.3f} s, the median of {len(seconds)}; {min(seconds):.3f} to "
        f"{max(seconds):.3f} s, of these at most {max(slowest.data_seconds):.3f} s of wait for "
        f"data; {slowest.inspection.seconds:.3f} s under the profiler",
        f"{rate:,.0f} tokens/s, {rate / num_ranks:,.0f} tokens/s per rank",
    ]
    hours = measurement.median * measurement.num_steps / 3600
    lines.append(
        f"{measurement.num_steps:,} steps: {hours:,.1f} hours, {hours * num_ranks:,.0f} rank hours"
    )
    return lines
