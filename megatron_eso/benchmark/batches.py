"""Where the samples of measured steps come from: drawn tokens, or the data of the run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_eso.batches.dealing import Dealing, count_tokens
from megatron_eso.batches.rows import MicroBatch
from megatron_eso.config.sections import Config
from megatron_eso.data.samples.training_data import TrainingData
from megatron_eso.objectives.objective import Objective, Samples, Step
from megatron_eso.simulation.micro_batches import build_run_objective
from megatron_eso.training.steps.batches import StepPlan, TrainingBatches
from megatron_eso.training.steps.prefetch import StepPrefetcher

TakePlan = Callable[[int], StepPlan]
"""Returns this rank's plan of a step by its number, from 0 on; the numbers come in order."""


def draw_plans(config: Config, groups: ProcessGroupCollection, number: int) -> TakePlan:
    """Plan steps with random tokens and the noise of the run, all of them at once.

    Samples have their full length. Ranks that share a copy of the model draw the same.

    Args:
        config: Its vocabulary is known.
        groups: Groups of this rank.
        number: Steps to plan.
    """
    objective = build_run_objective(config)
    plans = [_draw_plan(config, objective, groups, step) for step in range(number)]
    return plans.__getitem__


@contextmanager
def read_plans(
    config: Config, groups: ProcessGroupCollection, data: TrainingData
) -> Iterator[TakePlan]:
    """Read the run's own data and plan its steps ahead, as training does.

    Args:
        config: Its vocabulary is known.
        groups: Groups of this rank.
        data: The open training data of the configuration.
    """
    batches = TrainingBatches(
        build_run_objective(config),
        data,
        config.train,
        data_parallel_size=groups.dp.size(),
        row_multiple=config.parallel.row_multiple,
    )
    with StepPrefetcher(batches, groups.dp.rank(), config.data.prefetch_steps) as prefetcher:
        size = config.train.global_batch_size
        yield lambda number: prefetcher.take(batches.step(number, number * size))


def _draw_plan(
    config: Config, objective: Objective, groups: ProcessGroupCollection, number: int
) -> StepPlan:
    """Plan a step with random tokens, any but the mask."""
    train, length, rank = config.train, config.data.sequence_length, groups.dp.rank()
    size, vocabulary = train.global_batch_size, config.data.vocabulary
    share = objective.phases[0].share
    dealing = Dealing(size, train.micro_batch_size, groups.dp.size(), share)
    step = Step(number=number, first_index=number * size, batch_size=size)
    generator = np.random.default_rng([config.run.seed, number, rank])

    def plan(indices_B: np.ndarray) -> MicroBatch:
        tokens_BT = generator.integers(vocabulary.size - 1, size=(len(indices_B), length))
        tokens_BT += tokens_BT >= vocabulary.mask_token_id
        full_B = np.full(len(indices_B), length)
        samples = Samples(tokens_BT=tokens_BT, indices_B=indices_B, length_B=full_B)
        planned = objective.plan(samples, step)
        return planned.pad(config.parallel.row_multiple, vocabulary.mask_token_id)

    # The denominators of the losses, as in training.
    targets_N = objective.count_targets(np.full(size, length))
    plans = StepPlan(
        micro_batches=[plan(step.first_index + places) for places in dealing.micro_batches(rank)],
        tokens=count_tokens(targets_N, objective.assign_phases(step), len(objective.phases)),
    )
    return plans.pin_memory() if torch.cuda.is_available() else plans
