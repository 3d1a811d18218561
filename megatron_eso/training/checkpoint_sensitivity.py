"""Measures the likelihoods of a checkpoint over orders and parallel schedules, on any layout."""

from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.process_groups_config import ProcessGroupCollection
from numpy.typing import NDArray

from megatron_eso.config.sections import Config
from megatron_eso.data.samples.validation_data import ValidationData
from megatron_eso.objectives.build import build_objective
from megatron_eso.progress import Progress
from megatron_eso.ranks import is_first_rank
from megatron_eso.runs.checkpoint_state import read_checkpoint_state
from megatron_eso.sensitivity.report import Likelihood
from megatron_eso.sensitivity.schedules import Schedule, list_schedules
from megatron_eso.training.checkpoint_evaluation import choose_weights, load_state
from megatron_eso.training.distributed.parallel import (
    find_timeout,
    model_parallel_groups,
    process_group,
)
from megatron_eso.training.steps.batches import ValidationBatches
from megatron_eso.training.steps.evaluation import sum_over_samples
from megatron_eso.training.steps.train_state import TrainState


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
    # The checkpoint and the validation set.
    record = read_checkpoint_state(checkpoint)
    weights = choose_weights(checkpoint, record, validation, weights)
    objective = build_objective(config.objective, config.data.vocabulary, seed=config.run.seed)
    batches = ValidationBatches(
        objective, validation, config.validation, row_multiple=config.parallel.row_multiple
    )
    schedules = list_schedules(
        config.objective,
        config.data.vocabulary,
        length=config.data.sequence_length,
        num_samples=batches.num_samples,
    )
    # The nats per token of every sample under each schedule.
    timeout = find_timeout(config.watchdog)
    with process_group(timeout), model_parallel_groups(config.parallel) as groups:
        state = load_state(checkpoint, config, weights, groups)
        progress = Progress("sensitivity", len(schedules), unit="schedules")
        nats = []
        for schedule in schedules:
            nats.append(measure(state, batches, groups, schedule))
            if is_first_rank():
                progress.advance(1)
    head = {
        "step": record.counters.step,
        "weights": weights,
        "objective": config.objective.name,
        "num_samples": batches.num_samples,
        "sequence_length": config.data.sequence_length,
    }
    return head, [
        Likelihood.of(schedule.name, schedule.tokens_per_step, nats_N, nats[0])
        for schedule, nats_N in zip(schedules, nats, strict=True)
    ]


def measure(
    state: TrainState,
    batches: ValidationBatches,
    groups: ProcessGroupCollection,
    schedule: Schedule,
) -> NDArray[np.float64]:
    """Return the nats per token of each sample `[N]`; collective over the world."""
    micro_batches = batches.plan_by(schedule.plan, groups.dp.rank(), groups.dp.size())
    sums_PN = sum_over_samples(state, micro_batches, batches, groups).numpy()
    nats_N: NDArray[np.float64] = sums_PN.sum(axis=0) / batches.num_targets
    return nats_N
