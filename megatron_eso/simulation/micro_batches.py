"""The micro-batches that a step is simulated with: one of the usual size, and the largest."""

from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_eso.batches.dealing import Dealing
from megatron_eso.batches.rows import LossRows, MicroBatch, Rows
from megatron_eso.config.sections import Config
from megatron_eso.objectives.build import build_objective
from megatron_eso.objectives.objective import Objective, Samples, Step
from megatron_eso.objectives.row_counts import RowCounts

Part = TypeVar("Part", Rows, LossRows)

TINY_LENGTH = 4
MAX_TRIED = 64
"""Micro-batches of the first step among which the most usual one is chosen."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Kind:
    """Micro-batches of a step that hold the same number of samples of each phase.

    Attributes:
        share: Share of the micro-batches of a step that are of this kind.
        usual: The one whose rows are closest to the mean.
        largest: One with as many rows as any.
        tiny: One with a few rows.
    """

    share: float
    usual: MicroBatch
    largest: MicroBatch
    tiny: MicroBatch


def build_run_objective(config: Config) -> Objective:
    """Build the objective of a configuration whose vocabulary is known."""
    return build_objective(config.objective, config.data.vocabulary, seed=config.run.seed)


def plan_kinds(config: Config, data_parallel_size: int) -> list[Kind]:
    """Plan micro-batches of every kind, with the noise of the run's first step.

    Samples have their full length, and tokens without a meaning.

    Args:
        config: Its vocabulary is known.
        data_parallel_size: Number of data-parallel ranks.
    """
    objective, train = build_run_objective(config), config.train
    share = objective.phases[0].share
    dealing = Dealing(train.global_batch_size, train.micro_batch_size, data_parallel_size, share)
    of_rank = dealing.micro_batches(0)
    counts = Counter(_count_phases(dealing, places) for places in of_rank)
    kinds = []
    for phases, number in counts.items():
        phase_B = np.repeat(np.arange(len(phases)), phases)
        largest = objective.plan_largest(phase_B, config.data.sequence_length)
        kinds.append(
            Kind(
                share=number / len(of_rank),
                usual=_pad(_find_usual(config, objective, dealing, phases), config),
                largest=_pad(largest, config),
                tiny=_pad(objective.plan_largest(phase_B[:1], TINY_LENGTH), config),
            )
        )
    return kinds


def find_largest(kinds: list[Kind]) -> MicroBatch:
    """Return the micro-batch with the most rows."""
    return max((kind.largest for kind in kinds), key=lambda batch: batch.rows.num_rows)


def copy_to_fake(micro_batch: MicroBatch, mode: FakeTensorMode) -> MicroBatch:
    """Return the micro-batch with tensors without values, in the memory of the host."""

    def copy(part: Part) -> Part:
        values = {each.name: getattr(part, each.name) for each in fields(part)}
        changes: dict[str, Any] = {
            name: mode.from_tensor(value)
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        return replace(part, **changes)

    return replace(micro_batch, rows=copy(micro_batch.rows), loss=copy(micro_batch.loss))


def _find_usual(
    config: Config, objective: Objective, dealing: Dealing, phases: tuple[int, ...]
) -> MicroBatch:
    """Return the micro-batch of a kind whose rows and loss rows are closest to their mean."""
    num_tokens, vocabulary = config.data.sequence_length, config.data.vocabulary
    step = Step.late(dealing.global_batch_size)
    # The expected rows, and the places of the micro-batches of this kind.
    expected = RowCounts()
    for counts, number in zip(objective.expect_rows(num_tokens), phases, strict=False):
        expected += counts * number
    places = [
        each
        for rank in range(dealing.data_parallel_size)
        for each in dealing.micro_batches(rank)
        if _count_phases(dealing, each) == phases
    ]
    # Plan some of them, and take the closest.
    plans = [
        objective.plan(
            Samples(
                # Any token but the mask can be a target.
                tokens_BT=np.full((len(each), num_tokens), int(vocabulary.mask_token_id == 0)),
                indices_B=each,
                length_B=np.full(len(each), num_tokens),
            ),
            step,
        )
        for each in places[:MAX_TRIED]
    ]

    def distance(plan: MicroBatch) -> float:
        rows, loss_rows = plan.rows.num_rows, plan.rows.num_loss_rows
        return abs(rows - expected.rows) + abs(loss_rows - expected.loss_rows)

    return min(plans, key=distance)


def _count_phases(dealing: Dealing, places: NDArray[np.int64]) -> tuple[int, ...]:
    phase_B = dealing.split.phases(places)
    return tuple(int((phase_B == phase).sum()) for phase in range(2))


def _pad(micro_batch: MicroBatch, config: Config) -> MicroBatch:
    vocabulary = config.data.vocabulary
    return micro_batch.pad(config.parallel.row_multiple, vocabulary.mask_token_id)
