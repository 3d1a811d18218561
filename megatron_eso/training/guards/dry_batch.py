"""The largest micro-batch that can come, tried at the start: what lacks memory fails before step 1.

How many rows a micro-batch has depends on its noise. At most, every token is masked.
"""

import logging
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_eso.config.sections import Config
from megatron_eso.errors import ConfigError
from megatron_eso.ranks import is_first_rank, own_rank
from megatron_eso.training.optimization.optimizer import MOMENTS
from megatron_eso.training.steps.batches import TrainingBatches
from megatron_eso.training.steps.step import clear_gradients, forward_step, run_schedule
from megatron_eso.training.steps.train_state import TrainState

GIBI = 2**30

logger = logging.getLogger(__name__)


def try_largest_batch(
    config: Config, state: TrainState, batches: TrainingBatches, groups: ProcessGroupCollection
) -> None:
    """Run the largest micro-batches through the schedule, if there is a GPU; collective.

    Raises:
        ConfigError: They do not fit; the message names what to lower.
    """
    if not torch.cuda.is_available():
        return
    seed = config.run.seed if config.model.hidden_dropout > 0 else None
    try:
        run_largest_batch(state, batches, groups, dropout_seed=seed)
    except torch.OutOfMemoryError as error:
        num_rows = batches.plan_largest().rows.num_rows
        refusal = explain_shortage(config, num_rows, torch.cuda.max_memory_allocated())
        if not is_first_rank():  # rank 0 need not lack memory too
            logger.error("%s", refusal)
        raise refusal from error
    used, total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    logger.info(
        "the largest micro-batch takes %.1f of %.1f GiB on rank 0", used / GIBI, total / GIBI
    )
    torch.cuda.empty_cache()


def run_largest_batch(
    state: TrainState,
    batches: TrainingBatches,
    groups: ProcessGroupCollection,
    *,
    dropout_seed: int | None,
) -> None:
    """Run forward and backward of as many of them as are in flight; `state` is left as it was."""
    # What the first update takes for good must be there beside the activations.
    held = [
        torch.empty_like(parameter.main)
        for parameter in state.parameters
        for name in MOMENTS
        if parameter.main is not None and name not in parameter.inner.state[parameter.main]
    ]
    num_stages = groups.pp.size()
    # An interleaved pipeline begins with up to this many forwards before its first backward.
    in_flight = 1 if num_stages == 1 else min(2 * num_stages, batches.dealing.num_micro_batches)
    step = partial(
        forward_step,
        objective=batches.objective,
        tokens=[1] * len(batches.objective.phases),
        scale=1,
        dropout_seed=dropout_seed,
        pp_rank=groups.pp.rank(),
    )
    run_schedule(step, state, [batches.plan_largest()] * in_flight, groups, forward_only=False)
    clear_gradients(state)
    del held


def explain_shortage(config: Config, num_rows: int, used: int) -> ConfigError:
    """Return the error of a rank whose memory does not suffice; `used` in bytes at most so far."""
    train, parallel = config.train, config.parallel
    recompute = (
        ' or set train.recompute_granularity = "full"'
        if train.recompute_granularity == "none"
        else ""
    )
    return ConfigError(
        f"rank {own_rank()}: out of memory before step 1, beyond "
        f"{used / GIBI:.1f} GiB, at the largest micro-batch: {num_rows} rows of "
        f"train.micro_batch_size = {train.micro_batch_size} samples of data.sequence_length = "
        f"{config.data.sequence_length}: lower these,{recompute} or share the model among more "
        f"ranks with parallel.tensor_model_parallel_size = {parallel.tensor_model_parallel_size}, "
        f"parallel.pipeline_model_parallel_size = {parallel.pipeline_model_parallel_size} or "
        f"parallel.use_distributed_optimizer = {str(parallel.use_distributed_optimizer).lower()}"
    )
