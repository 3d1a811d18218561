"""What was simulated, as a table and as JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_eso.quantities import GIB
from megatron_eso.simulation.collectives import Collective
from megatron_eso.simulation.recorder import PartUse
from megatron_eso.simulation.simulator import Simulation
from megatron_eso.simulation.stage import StepUse

SHOWN_BYTES = GIB / 200
Collectives = Mapping[Collective, int]
Waits = Mapping[tuple[str, str], int]
"""How often each collective ran, and how often the host waited, by reason and place."""


def describe_simulation(simulation: Simulation) -> dict[str, Any]:
    """Return all figures of a simulation by name, in seconds and bytes."""
    slowest, fullest = simulation.slowest, simulation.fullest
    return {
        "simulated": True,
        "gpu": simulation.gpu.name,
        "world_size": simulation.world_size,
        "parameters_of_rank": slowest.num_parameters,
        "micro_batches": simulation.num_micro_batches,
        # Totals.
        "step_seconds": simulation.step_seconds,
        "bubble_seconds": simulation.bubble,
        "tokens_per_second_per_gpu": simulation.tokens_per_second,
        "gpu_hours": simulation.gpu_hours,
        "mfu": simulation.utilizations,
        "memory": {
            "rank": fullest.rank,
            "peak": sum(fullest.peak.values()),
            "parts": fullest.peak,
            "between_steps": fullest.held,
        },
        "simulated_micro_batches": slowest.num_micro_batches,
        **describe_step(slowest.step, slowest.collectives, slowest.waits),
    }


def describe_step(
    step: StepUse, collectives: Collectives, waits: Waits
) -> dict[str, list[dict[str, Any]]]:
    """Return the parts, the communication and the host waits of a step, by name."""
    return {
        "parts": _describe_parts(step),
        "communication": _describe_communication(step),
        "collectives": [{**asdict(found), "count": count} for found, count in collectives.items()],
        "host_waits": [
            {"place": place, "reason": reason, "count": count}
            for (reason, place), count in waits.items()
        ],
    }


def _describe_parts(step: StepUse) -> list[dict[str, Any]]:
    return [
        {"part": name, "per": per, **asdict(use)}
        for per, uses in (("micro-batch", step.parts), ("step", step.once))
        for name, use in sorted(uses.items(), key=lambda item: -item[1].seconds)
    ]


def _describe_communication(step: StepUse) -> list[dict[str, Any]]:
    return [
        {"purpose": purpose, "per": per, "seconds": seconds, "exposed_seconds": exposed[purpose]}
        for per, busy, exposed in (
            ("micro-batch", step.busy, step.exposed),
            ("step", step.busy_once, step.exposed_once),
        )
        for purpose, seconds in busy.items()
        if seconds
    ]


def format_simulation(simulation: Simulation) -> str:
    """Return the figures as a table for people."""
    sections = [
        [f"simulated: {simulation.world_size} x {simulation.gpu.name}; no GPU was used"],
        _format_memory(simulation),
        _format_parts(simulation),
        _format_communication(simulation),
        _format_waits(simulation),
        _format_result(simulation),
    ]
    return "\n".join("\n".join(lines) + "\n" for lines in sections)


def _format_memory(simulation: Simulation) -> list[str]:
    fullest = simulation.fullest
    return [
        f"memory of rank {fullest.rank} at its peak, in {fullest.peak_part} of the largest "
        f"micro-batch, GiB",
        *format_sizes(fullest.peak),
        f"{sum(fullest.peak.values()) / GIB:10.2f}  sum, of {simulation.gpu.memory / GIB:.1f}; "
        f"CUDA, NCCL and fragmentation come on top",
    ]


def format_sizes(sizes: Mapping[str, int]) -> list[str]:
    """Return a line for each size that shows in GiB, the largest first."""
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return [f"{size / GIB:10.2f}  {label}" for label, size in ordered if size >= SHOWN_BYTES]


def _format_parts(simulation: Simulation) -> list[str]:
    slowest, number = simulation.slowest, simulation.num_micro_batches
    return [
        f"kernels of rank {slowest.rank}; a step has {number} micro-batches",
        *format_parts(slowest.step),
    ]


def format_parts(step: StepUse) -> list[str]:
    """Return the table of the parts of a step."""
    lines = ["        ms   kernels    TFLOP        GB  part"]
    for title, uses in (("a micro-batch", step.parts), ("once in a step", step.once)):
        total = PartUse()
        for name, use in sorted(uses.items(), key=lambda item: -item[1].seconds):
            total.add(use)
            lines.append(_format_use(use, name))
        lines.append(_format_use(total, f"sum: {title}"))
    return lines


def _format_use(use: PartUse, name: str) -> str:
    return (
        f"{use.seconds * 1e3:10.2f}{use.kernels:10.0f}{use.flops / 1e12:9.2f}"
        f"{use.moved / 1e9:10.1f}  {name}"
    )


def _format_communication(simulation: Simulation) -> list[str]:
    slowest = simulation.slowest
    return [
        *format_communication(slowest.step),
        f"{'':10}{simulation.bubble * 1e3:10.2f}  pipeline bubble, once in a step",
        *format_collectives(slowest.collectives),
    ]


def format_communication(step: StepUse) -> list[str]:
    """Return the table of the time that collectives take, by purpose."""
    return [
        "communication, ms: its whole time, and the time that kernels wait for it",
        *(
            f"{each['seconds'] * 1e3:10.2f}{each['exposed_seconds'] * 1e3:10.2f}  "
            f"{each['purpose']}, once in a {each['per']}"
            for each in _describe_communication(step)
        ),
    ]


def format_collectives(collectives: Collectives) -> list[str]:
    """Return a line for each collective of several ranks."""
    return [
        f"{count:6d} x {each.name} of {each.size / 1e6:.1f} MB, {each.ranks} ranks "
        f"({each.purpose}), {each.seconds * 1e3:.3f} ms"
        for each, count in collectives.items()
        if each.ranks > 1
    ]


def _format_waits(simulation: Simulation) -> list[str]:
    slowest = simulation.slowest
    return format_waits(slowest.waits, slowest.num_micro_batches)


def format_waits(waits: Waits, num_micro_batches: int) -> list[str]:
    """Return a line for each place where the host waits for the GPU."""
    number = num_micro_batches
    batches = "1 micro-batch" if number == 1 else f"{number} micro-batches"
    return [
        f"where the host waits for the GPU in a step of {batches}",
        *(f"{count:6d} x {place}: {reason}" for (reason, place), count in waits.items()),
    ]


def _format_result(simulation: Simulation) -> list[str]:
    mfu = simulation.utilizations
    return [
        f"model FLOPs utilization: {mfu['kernels']:.1%} with forward and backward alone, "
        f"{mfu['with_optimizer']:.1%} with the optimizer, "
        f"{mfu['with_communication']:.1%} with communication, {mfu['with_bubble']:.1%} with the "
        f"pipeline bubble",
        f"a step: {simulation.step_seconds:.3f} s, {simulation.tokens_per_second:,.0f} tokens/s "
        f"per GPU",
        f"{simulation.num_steps:,} steps: {simulation.hours:,.1f} hours, "
        f"{simulation.gpu_hours:,.0f} GPU hours",
    ]
