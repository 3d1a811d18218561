"""Runs the largest possible micro-batch at the start: a lack of memory shows before step 1.

The number of rows of a micro-batch depends on its noise. The largest has every token masked.
"""

import logging
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_eso.config.sections import ParallelConfig, TrainConfig
from megatron_eso.errors import ConfigError
from megatron_eso.quantities import GIB
from megatron_eso.ranks import is_first_rank, own_rank
from megatron_eso.training.optimization.optimizer import MOMENTS
from megatron_eso.training.steps.batches import TrainingBatches
from megatron_eso.training.steps.step import clear_gradients, forward_step, run_schedule
from megatron_eso.training.steps.train_state import TrainState

logger = logging.getLogger(__name__)


def try_largest_batch(
    state: TrainState,
    batches: TrainingBatches,
    train: TrainConfig,
    parallel: ParallelConfig,
    groups: ProcessGroupCollection,
    *,
    dropout_seed: int | None,
) -> None:
    """Run the largest micro-batches through the schedule, if there is a GPU; collective.

    Args:
        state: Not changed.
        batches: Plans the batches of the run.
        train: Named in the error.
        parallel: Named in the error.
        groups: Groups of this rank.
        dropout_seed: The run's seed; None: no dropout.

    Raises:
        ConfigError: They do not fit; the message names what to lower.
    """
    if not torch.cuda.is_available():
        return
    try:
        run_largest_batch(state, batches, groups, dropout_seed=dropout_seed)
    except torch.OutOfMemoryError as error:
        used = torch.cuda.max_memory_allocated()
        refusal = explain_shortage(batches, train, parallel, used)
        if not is_first_rank():  # rank 0 may have enough memory
            logger.error("%s", refusal)
        raise refusal from error
    used, total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    logger.info(
        "the largest micro-batch takes %.1f GiB on rank 0, the allocator holds %.1f of %.1f GiB",
        used / GIB,
        torch.cuda.max_memory_reserved() / GIB,
        total / GIB,
    )
    torch.cuda.empty_cache()


def run_largest_batch(
    state: TrainState,
    batches: TrainingBatches,
    groups: ProcessGroupCollection,
    *,
    dropout_seed: int | None,
) -> None:
    """Run as many micro-batches as a step has in flight; `state` does not change."""
    # The moments, which the first update allocates, must fit together with the activations.
    held = [
        torch.empty_like(parameter.main)
        for parameter in state.parameters
        for name in MOMENTS
        if parameter.main is not None and name not in parameter.inner.state[parameter.main]
    ]
    num_stages = groups.pp.size()
    # An interleaved pipeline runs up to this many forwards before its first backward.
    in_flight = 1 if num_stages == 1 else min(2 * num_stages, batches.dealing.num_micro_batches)
    step = partial(
        forward_step,
        objective=batches.objective,
        tokens=[1] * len(batches.objective.phases),
        scale=1,
        dropout_seed=dropout_seed,
        pp_rank=groups.pp.rank(),
    )
    largest = [batches.plan_largest()] * in_flight
    run_schedule(step, state, largest, in_flight, groups, forward_only=False)
    clear_gradients(state)
    del held


def explain_shortage(
    batches: TrainingBatches, train: TrainConfig, parallel: ParallelConfig, used: int
) -> ConfigError:
    """Return the error of a rank that lacks memory; `used` is its peak so far, in bytes."""
    num_rows = batches.plan_largest().rows.num_rows
    recompute = (
        ' or set train.recompute_granularity = "full"'
        if train.recompute_granularity == "none"
        else ""
    )
    return ConfigError(
        f"rank {own_rank()}: out of memory before step 1, beyond "
        f"{used / GIB:.1f} GiB, at the largest micro-batch: {num_rows} rows of "
        f"train.micro_batch_size = {train.micro_batch_size} samples of data.sequence_length = "
        f"{batches.data.sequence_length}: lower these,{recompute} or share the model among more "
        f"ranks with parallel.tensor_model_parallel_size = {parallel.tensor_model_parallel_size}, "
        f"parallel.pipeline_model_parallel_size = {parallel.pipeline_model_parallel_size} or "
        f"parallel.use_distributed_optimizer = {str(parallel.use_distributed_optimizer).lower()}"
    )
