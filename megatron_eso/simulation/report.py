"""What was simulated, as a table and as JSON."""

from typing import Any

from megatron_eso.simulation.recorder import PartUse
from megatron_eso.simulation.simulator import Simulation

GIB = 2**30
SHOWN_BYTES = GIB / 200


def describe_simulation(simulation: Simulation) -> dict[str, Any]:
    """Return all figures of a simulation, in seconds and bytes, by name."""
    slowest, fullest = simulation.slowest, simulation.fullest
    kernels = simulation.kernels_seconds
    updated = kernels + simulation.update_seconds
    communicated = updated + simulation.exposed_seconds
    return {
        "simulated": True,
        "gpu": simulation.gpu.name,
        "world_size": simulation.world_size,
        "parameters_of_rank": slowest.num_parameters,
        "micro_batches": simulation.num_micro_batches,
        "step_seconds": simulation.step_seconds,
        "tokens_per_second_per_gpu": simulation.tokens_per_second,
        "gpu_hours": simulation.gpu_hours,
        "mfu": {
            "kernels": simulation.utilization(kernels),
            "with_optimizer": simulation.utilization(updated),
            "with_communication": simulation.utilization(communicated),
            "with_bubble": simulation.utilization(simulation.step_seconds),
        },
        "memory": {
            "rank": fullest.rank,
            "peak": fullest.peak,
            "peak_total": sum(fullest.peak.values()),
            "held": fullest.held,
        },
        "parts": {
            name: {
                "seconds": use.seconds,
                "kernels": use.kernels,
                "flops": use.flops,
                "bytes": use.moved,
                "per": per,
            }
            for per, uses in (
                ("micro-batch", slowest.step.parts),
                ("step", slowest.step.once),
            )
            for name, use in sorted(uses.items(), key=lambda item: -item[1].seconds)
        },
        "communication": [
            {
                "purpose": purpose,
                "per": per,
                "seconds": seconds,
                "exposed_seconds": exposed[purpose],
            }
            for per, busy, exposed in (
                ("micro-batch", slowest.step.busy, slowest.step.exposed),
                ("step", slowest.step.busy_once, slowest.step.exposed_once),
            )
            for purpose, seconds in busy.items()
            if seconds
        ],
        "bubble_seconds": simulation.bubble,
        "simulated_micro_batches": slowest.num_micro_batches,
        "collectives": [
            {
                "name": found.name,
                "purpose": found.purpose,
                "ranks": found.ranks,
                "bytes": found.size,
                "seconds": found.seconds,
                "count": count,
            }
            for found, count in slowest.collectives.items()
            if found.ranks > 1
        ],
        "host_waits": [
            {"reason": reason, "place": place, "count": count}
            for (reason, place), count in slowest.waits.items()
        ],
    }


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
    peak = sorted(fullest.peak.items(), key=lambda item: -item[1])
    return [
        f"memory of rank {fullest.rank} at its peak, with the largest micro-batch, GiB",
        *(f"{size / GIB:10.2f}  {label}" for label, size in peak if size >= SHOWN_BYTES),
        f"{sum(fullest.peak.values()) / GIB:10.2f}  sum, of {simulation.gpu.memory / GIB:.1f}; "
        f"CUDA, NCCL and fragmentation come on top",
    ]


def _format_parts(simulation: Simulation) -> list[str]:
    slowest = simulation.slowest
    lines = [
        f"kernels of rank {slowest.rank}; a step has {simulation.num_micro_batches} micro-batches",
        "        ms   kernels    TFLOP        GB  part",
    ]
    for title, uses in (
        ("a micro-batch", slowest.step.parts),
        ("once in a step", slowest.step.once),
    ):
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
        "communication, ms: its whole time, and the time that kernels wait for it",
        *(
            f"{each['seconds'] * 1e3:10.2f}{each['exposed_seconds'] * 1e3:10.2f}  "
            f"{each['purpose']}, once in a {each['per']}"
            for each in describe_simulation(simulation)["communication"]
        ),
        f"{'':10}{simulation.bubble * 1e3:10.2f}  pipeline bubble, once in a step",
        *(
            f"{count:6d} x {each.name} of {each.size / 1e6:.1f} MB, {each.ranks} ranks "
            f"({each.purpose}), {each.seconds * 1e3:.3f} ms"
            for each, count in slowest.collectives.items()
            if each.ranks > 1
        ),
    ]


def _format_waits(simulation: Simulation) -> list[str]:
    slowest = simulation.slowest
    number = slowest.num_micro_batches
    batches = "1 micro-batch" if number == 1 else f"{number} micro-batches"
    return [
        f"where the host waits for the GPU in a step of {batches}",
        *(f"{count:6d} x {place}: {reason}" for (reason, place), count in slowest.waits.items()),
    ]


def _format_result(simulation: Simulation) -> list[str]:
    mfu = describe_simulation(simulation)["mfu"]
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
