"""The largest micro-batch of a run, on which its memory depends."""

from dataclasses import dataclass

import numpy as np

from megatron_eso.batches.dealing import Dealing
from megatron_eso.batches.rows import STREAMS, MicroBatch
from megatron_eso.config.sections import Config
from megatron_eso.objectives.objective import Objective


@dataclass(frozen=True, slots=True)
class LargestBatch:
    """Sizes of the largest micro-batch.

    Attributes:
        rows: Rows, with padding.
        loss_rows: Rows that carry loss, with padding.
        queries: Rows that read more than the rows of their own stream, in every layer.
        num_micro_batches: Micro-batches of a step on each rank.
    """

    rows: int
    loss_rows: int
    queries: int
    num_micro_batches: int


def find_largest(config: Config, objective: Objective, data_parallel_size: int) -> LargestBatch:
    """Measure the largest micro-batch: every token that can be masked is.

    Args:
        config: The configuration.
        objective: Its objective.
        data_parallel_size: Number of data-parallel ranks.
    """
    train = config.train
    share = objective.phases[0].share
    dealing = Dealing(train.global_batch_size, train.micro_batch_size, data_parallel_size, share)
    kinds = {tuple(dealing.split.phases(places)) for places in dealing.micro_batches(0)}
    plans = [_plan(config, objective, phases) for phases in kinds]
    rows = max(plans, key=lambda plan: plan.rows.num_rows).rows
    return LargestBatch(
        rows=len(rows.tokens_R),
        loss_rows=len(rows.loss_rows_E),
        queries=sum(span.num_rows for span in rows.spans if span.reading not in STREAMS),
        num_micro_batches=dealing.num_micro_batches,
    )


def _plan(config: Config, objective: Objective, phases: tuple[int, ...]) -> MicroBatch:
    plan = objective.plan_largest(np.asarray(phases), config.data.sequence_length)
    return plan.pad(config.parallel.row_multiple, mask_token_id=0)
