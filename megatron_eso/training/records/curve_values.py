"""Lists the values of a run's curves by tag, for a step and for a validation."""

from dataclasses import dataclass

import torch

from megatron_eso.batches.loss import NelboEstimate
from megatron_eso.runs.counters import Counters
from megatron_eso.training.guards.stragglers import Straggler
from megatron_eso.training.records import tags
from megatron_eso.training.records.device import (
    published_peak,
    reserved_memory_gib,
    used_memory_gib,
)
from megatron_eso.training.steps.step import StepResult


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """The times of a step, in seconds.

    Attributes:
        step: The whole step.
        data: The wait for data on rank 0, within the step.
        held: Time since the last record in which the steps waited for saves.
        written: From start to publication of the last save; None if no save was published since
            the last record.
        left: Estimate until the last step.
    """

    step: float
    data: float
    held: float
    written: float | None
    left: float


def list_step_values(
    result: StepResult,
    counters: Counters,
    times: StepTimes,
    straggler: Straggler,
    flops_per_token: float,
) -> dict[str, float]:
    """List the values of a step; no communication, but the process group exists."""
    # Of the update, then of speed, memory and saves.
    num_ranks = torch.distributed.get_world_size()
    tokens_per_second = result.num_tokens / times.step
    values = {
        tags.LOSS: result.loss,
        tags.NELBO: result.nelbo,
        **{tags.loss_of_phase(phase): loss for phase, loss in result.losses.items()},
        tags.GRAD_NORM: result.grad_norm,
        tags.LEARNING_RATE: result.learning_rate,
        tags.DEVIATIONS: result.deviations,
        tags.SKIPPED_STEPS: counters.skipped_steps,
        tags.SPIKES: counters.spikes,
        tags.ROLLBACKS: counters.rollbacks,
        tags.STEP_SECONDS: times.step,
        tags.DATA_WAIT_SECONDS: times.data,
        tags.TOKENS_PER_SECOND: tokens_per_second,
        tags.TOKENS_PER_SECOND_PER_GPU: tokens_per_second / num_ranks,
        tags.MEMORY_GIB: used_memory_gib(),
        tags.CHECKPOINT_SECONDS: times.held,
        tags.STRAGGLER_RANK: straggler.rank,
        tags.STRAGGLER_SECONDS: straggler.seconds,
        tags.STRAGGLER_SPREAD: straggler.spread,
        tags.TOKENS: counters.tokens,
        tags.FLOPS: counters.flops,
    }
    if times.written is not None:
        values[tags.CHECKPOINT_WRITE_SECONDS] = times.written
    reserved = reserved_memory_gib()
    if reserved is not None:
        values[tags.MEMORY_RESERVED_GIB] = reserved
    # Only for devices with a published peak.
    peak = published_peak()
    if peak:
        values[tags.MFU] = tokens_per_second / num_ranks * flops_per_token / peak
    return values


def list_validation_values(estimate: NelboEstimate) -> dict[str, float]:
    """List the values of a validation."""
    values = {
        tags.VAL_NELBO: estimate.nelbo,
        tags.VAL_PERPLEXITY: estimate.perplexity,
        **{tags.val_nelbo_of_phase(phase): value for phase, value in estimate.phases.items()},
        tags.VAL_NELBO_STDERR: estimate.standard_error,
    }
    for phase, by_time in estimate.by_time.items():
        values |= {tags.val_nelbo_by_time(phase, t): value for t, value in by_time.items()}
    return values
