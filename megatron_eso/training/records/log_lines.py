"""Formats the lines of the log: steps, validations, skipped and flagged updates."""

from collections.abc import Sequence

from megatron_eso.batches.loss import NelboEstimate
from megatron_eso.quantities import format_seconds
from megatron_eso.runs.counters import Counters
from megatron_eso.training.guards.stragglers import Straggler
from megatron_eso.training.records.curve_values import StepTimes
from megatron_eso.training.steps.step import StepResult

MAX_NAMED_RANKS = 8


def describe_step(
    result: StepResult, counters: Counters, num_steps: int, times: StepTimes, straggler: Straggler
) -> str:
    """Return a line of progress."""
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
    """Return a line about a step that was skipped or flagged; None for other steps.

    Args:
        result: The result of the step.
        before: The counters before it.
        after: The counters after it.
        hosts: The host of every rank.
    """
    if result.skipped:
        what = f"UPDATE SKIPPED, {after.skipped_in_row} in a row"
    elif after.spikes > before.spikes:
        what = "spike"
    else:
        return None
    shown = [f"rank {rank} on {hosts[rank]}" for rank in result.bad_ranks[:MAX_NAMED_RANKS]]
    num_hidden = len(result.bad_ranks) - len(shown)
    more = f" and {num_hidden} more" if num_hidden else ""
    where = f"; not finite on {', '.join(shown)}{more}" if shown else ""
    return (
        f"step {after.step}, samples {before.consumed_samples} to {after.consumed_samples - 1}: "
        f"{what}: loss {result.loss:.4f} ({_describe_phases(result)}), grad norm "
        f"{result.grad_norm:.3f}, {result.deviations:.1f} deviations above the steps before{where}"
    )


def describe_validation(step: int, estimate: NelboEstimate, *, has_ema: bool) -> str:
    """Return a line about a validation; `has_ema`: it used the EMA weights."""
    return (
        f"step {step} | validation NELBO {estimate.nelbo:.4f} +- {estimate.standard_error:.4f} "
        f"nats per token, perplexity {estimate.perplexity:.2f}{' (EMA weights)' * has_ema}"
    )


def _describe_phases(result: StepResult) -> str:
    return ", ".join(f"{phase} {loss:.4f}" for phase, loss in result.losses.items())
