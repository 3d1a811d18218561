"""The largest micro-batch that can come, tried at the start: what lacks memory fails before step 1.

How many rows a micro-batch has depends on its noise. At most, every token is masked: a diffusion
sample then has T rows, a sequential one T - 1 clean rows and T queries.

Shapes: B samples of a micro-batch, T positions or slots.
"""

import logging
from functools import partial

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_eso.config.sections import Config
from megatron_eso.errors import ConfigError
from megatron_eso.objectives.dealing import Dealing
from megatron_eso.objectives.loss import PhaseTokens
from megatron_eso.objectives.noise import Noise
from megatron_eso.objectives.rows import plan_rows
from megatron_eso.objectives.schedule import LogLinearSchedule
from megatron_eso.runs.checkpoint import MOMENTS
from megatron_eso.training.batches import MicroBatch, row_multiple
from megatron_eso.training.step import clear_gradients, forward_step, run_schedule
from megatron_eso.training.train_state import TrainState

GIBI = 2**30

logger = logging.getLogger(__name__)


def try_largest_batch(config: Config, state: TrainState, groups: ProcessGroupCollection) -> None:
    """Run the largest micro-batches through the schedule, if there is a GPU; collective.

    Raises:
        ConfigError: They do not fit; the message names what to lower.
    """
    if not torch.cuda.is_available():
        return
    try:
        run_largest_batch(config, state, groups)
    except torch.OutOfMemoryError as error:
        told = explain_shortage(config, groups, torch.cuda.max_memory_allocated())
        if torch.distributed.get_rank() > 0:  # rank 0 need not lack memory too
            logger.error("%s", told)
        raise told from error
    used, total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    logger.info(
        "the largest micro-batch takes %.1f of %.1f GiB on rank 0", used / GIBI, total / GIBI
    )
    torch.cuda.empty_cache()


def run_largest_batch(config: Config, state: TrainState, groups: ProcessGroupCollection) -> None:
    """Forward and backward of as many of them as are in flight; `state` is left as it was."""
    # What the first update takes for good must be there beside the activations.
    held = [
        torch.empty_like(parameter.main)
        for parameter in state.parameters
        for name in MOMENTS
        if parameter.main is not None and name not in parameter.inner.state[parameter.main]
    ]
    largest = plan_largest(config, groups.dp.size())
    dealing = deal(config, groups.dp.size())
    num_stages = groups.pp.size()
    # An interleaved pipeline begins with up to this many forwards before its first backward.
    in_flight = 1 if num_stages == 1 else min(2 * num_stages, dealing.num_micro_batches)
    step = partial(
        forward_step,
        tokens=PhaseTokens(diffusion=1, sequential=1),
        scale=1,
        dropout_seed=config.run.seed if config.model.hidden_dropout > 0 else None,
        pp_rank=groups.pp.rank(),
    )
    run_schedule(step, state, [largest] * in_flight, groups, forward_only=False)
    clear_gradients(state)
    del held


def plan_largest(config: Config, data_parallel_size: int) -> MicroBatch:
    """A micro-batch with at least as many rows of every kind as any of the run's."""
    micro_batches = deal(config, data_parallel_size).micro_batches(0)
    is_sequential_B = max(
        (deal(config, data_parallel_size).is_sequential(places) for places in micro_batches),
        key=np.count_nonzero,
    )
    shape = (config.train.micro_batch_size, config.data.sequence_length)
    mask_token_id = config.data.mask_token_id
    assert mask_token_id is not None
    noise = Noise(
        length_B=np.full(shape[0], shape[1]),
        is_masked_BT=np.ones(shape, dtype=np.bool_),
        permutation_BT=np.tile(np.arange(shape[1]), (shape[0], 1)),
        t_B=np.where(is_sequential_B, np.nan, 1.0),
        is_sequential_B=is_sequential_B,
    )
    plan = plan_rows(
        # Any token but the mask can be a target.
        np.full(shape, 1 if mask_token_id == 0 else 0),
        noise,
        schedule=LogLinearSchedule(config.objective.alpha_0),
        loss_type=config.objective.loss_type,
        mask_token_id=mask_token_id,
        row_multiple=row_multiple(config),
    )
    return MicroBatch(plan=plan, indices=np.arange(shape[0]), is_sequential=is_sequential_B)


def deal(config: Config, data_parallel_size: int) -> Dealing:
    """The run's dealing."""
    return Dealing(
        config.train.global_batch_size,
        config.train.micro_batch_size,
        data_parallel_size,
        config.objective.batch_split,
    )


def explain_shortage(config: Config, groups: ProcessGroupCollection, used: int) -> ConfigError:
    """The error of a rank whose memory does not suffice; `used` in bytes, at most so far."""
    train, parallel = config.train, config.parallel
    plan = plan_largest(config, groups.dp.size()).plan
    recompute = (
        ' or set train.recompute_granularity = "full"'
        if train.recompute_granularity == "none"
        else ""
    )
    return ConfigError(
        f"rank {torch.distributed.get_rank()}: out of memory before step 1, beyond "
        f"{used / GIBI:.1f} GiB, at the largest micro-batch: {plan.num_rows} rows of "
        f"train.micro_batch_size = {train.micro_batch_size} samples of data.sequence_length = "
        f"{config.data.sequence_length}: lower these,{recompute} or share the model among more "
        f"ranks with parallel.tensor_model_parallel_size = {parallel.tensor_model_parallel_size}, "
        f"parallel.pipeline_model_parallel_size = {parallel.pipeline_model_parallel_size} or "
        f"parallel.use_distributed_optimizer = {str(parallel.use_distributed_optimizer).lower()}"
    )
