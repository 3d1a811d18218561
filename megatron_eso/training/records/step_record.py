"""What is recorded of a step: the values of its curves, and its line in the log."""

import resource
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_eso.quantities import format_seconds
from megatron_eso.runs.checkpoint_state import Counters
from megatron_eso.training.guards.stragglers import Straggler
from megatron_eso.training.step import StepResult

GIBI = 2**30
MAX_NAMED = 8

# Dense bf16 peaks that the makers publish, FLOP/s, by a part of the device's name.
PUBLISHED_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """Where the time of a step went, in seconds.

    Attributes:
        step: The whole step.
        data: Of these, waited for data by rank 0.
        held: How long saves have held up the steps since the last record.
        written: From the beginning of the last save to its publication, where one was published
            since the last record.
        left: Until the last step, as far as can be told.
    """

    step: float
    data: float
    held: float
    written: float | None
    left: float


def list_values(
    result: StepResult,
    counters: Counters,
    times: StepTimes,
    straggler: Straggler,
    flops_per_token: float,
) -> dict[str, float]:
    """The values of a step by TensorBoard tag."""
    num_ranks = torch.distributed.get_world_size()
    tokens_per_second = result.num_tokens / times.step
    values = {
        "train/loss": result.loss,
        "train/nelbo": result.nelbo,
        **{f"train/loss_{phase}": loss for phase, loss in result.losses.items()},
        "train/grad_norm": result.grad_norm,
        "train/learning_rate": result.learning_rate,
        "train/deviations": result.deviations,
        "train/skipped_steps": counters.skipped_steps,
        "train/spikes": counters.spikes,
        "train/rollbacks": counters.rollbacks,
        "perf/step_seconds": times.step,
        "perf/data_wait_seconds": times.data,
        "perf/tokens_per_second": tokens_per_second,
        "perf/tokens_per_second_per_gpu": tokens_per_second / num_ranks,
        "perf/memory_gib": used_memory_gib(),
        "perf/checkpoint_seconds": times.held,
        "perf/straggler_rank": straggler.rank,
        "perf/straggler_seconds": straggler.seconds,
        "perf/straggler_spread": straggler.spread,
        "progress/tokens": counters.tokens,
        "progress/flops": counters.flops,
    }
    if times.written is not None:
        values["perf/checkpoint_write_seconds"] = times.written
    peak = published_peak()
    if peak:
        values["perf/mfu"] = tokens_per_second / num_ranks * flops_per_token / peak
    return values


def describe_step(
    result: StepResult, counters: Counters, num_steps: int, times: StepTimes, straggler: Straggler
) -> str:
    """A line of progress."""
    slow = (
        f" | slow: rank {straggler.rank} on {straggler.host}, {straggler.spread:.2f} times the "
        f"median"
    )
    return (
        f"step {counters.step}/{num_steps} | loss {result.loss:.4f} "
        f"({_describe_phases(result)}) | grad norm {result.grad_norm:.3f} | "
        f"lr {result.learning_rate:.2e} | {result.num_tokens / times.step:.0f} tokens/s | "
        f"ETA {format_seconds(times.left)}{slow if straggler.is_notable else ''}"
    )


def describe_oddity(
    result: StepResult, before: Counters, after: Counters, hosts: Sequence[str]
) -> str | None:
    """A line about a step whose update was left out, or that was flagged; else none."""
    if result.skipped:
        what = f"UPDATE LEFT OUT, {after.skipped_in_row} in a row"
    elif after.spikes > before.spikes:
        what = "spike"
    else:
        return None
    named = [f"rank {rank} on {hosts[rank]}" for rank in result.bad_ranks[:MAX_NAMED]]
    more = f" and {len(result.bad_ranks) - MAX_NAMED} more" * (len(result.bad_ranks) > MAX_NAMED)
    where = f"; not finite on {', '.join(named)}{more}" if named else ""
    return (
        f"step {after.step}, samples {before.consumed_samples} to {after.consumed_samples - 1}: "
        f"{what}: loss {result.loss:.4f} ({_describe_phases(result)}), grad norm "
        f"{result.grad_norm:.3f}, {result.deviations:.1f} deviations above the steps before{where}"
    )


def used_memory_gib() -> float:
    """Most memory that this process held: of its GPU, or of the machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIBI
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIBI


def published_peak() -> float | None:
    """Dense bf16 FLOP/s of this rank's GPU as published, none where it is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PUBLISHED_PEAKS.items() if part in name), None)


def _describe_phases(result: StepResult) -> str:
    return ", ".join(f"{phase} {loss:.4f}" for phase, loss in result.losses.items())
