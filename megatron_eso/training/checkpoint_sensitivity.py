"""Measures the likelihoods of a checkpoint over orders and parallel schedules, on any layout."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eso.config.sections import Config
from megatron_eso.data.samples.validation_data import ValidationData
from megatron_eso.progress import Progress
from megatron_eso.ranks import is_first_rank
from megatron_eso.sensitivity.report import Likelihood
from megatron_eso.sensitivity.schedules import Schedule, list_schedules
from megatron_eso.training.checkpoint_evaluation import LoadedCheckpoint, load_checkpoint
from megatron_eso.training.steps.evaluation import sum_over_samples


def measure_checkpoint(
    checkpoint: Path, config: Config, validation: ValidationData, weights: str | None
) -> tuple[dict[str, Any], list[Likelihood]]:
    """Load the weights on this layout and measure every schedule; collective over the world.

    Args:
        checkpoint: A checkpoint of any layout.
        config: The model and objective of the checkpoint, and the layout of these ranks.
        validation: The shards to evaluate on.
        weights: `ema` or `raw`; by default EMA if the checkpoint has it.

    Returns:
        What was measured, and the likelihoods; the first one is that of the schedule of training.

    Raises:
        CheckpointError: The checkpoint is damaged, or lacks these weights.
        DataError: The shards are of another tokenizer.
    """
    with load_checkpoint(checkpoint, config, validation, weights) as loaded:
        num_samples, length = loaded.batches.num_samples, config.data.sequence_length
        schedules = list_schedules(
            config.objective, config.data.vocabulary, length=length, num_samples=num_samples
        )
        progress = Progress("sensitivity", len(schedules), unit="schedules")
        nats = []
        for schedule in schedules:
            nats.append(measure(loaded, schedule))
            if is_first_rank():
                progress.advance(1)
    head = {
        "step": loaded.step,
        "weights": loaded.weights,
        "objective": config.objective.name,
        "num_samples": num_samples,
        "sequence_length": length,
    }
    return head, [
        Likelihood.of(schedule.name, schedule.tokens_per_step, nats_N, nats[0])
        for schedule, nats_N in zip(schedules, nats, strict=True)
    ]


def measure(loaded: LoadedCheckpoint, schedule: Schedule) -> NDArray[np.float64]:
    """Return the nats per token of each sample `[N]`; collective over the world."""
    batches, groups = loaded.batches, loaded.groups
    micro_batches = batches.plan_by(schedule.plan, groups.dp.rank(), groups.dp.size())
    sums_PN = sum_over_samples(loaded.state, micro_batches, batches, groups).numpy()
    nats_N: NDArray[np.float64] = sums_PN.sum(axis=0) / batches.num_targets
    return nats_N
