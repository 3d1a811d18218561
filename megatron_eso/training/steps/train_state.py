"""Builds the state that training steps change: model, optimizer, schedule, average, counters."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_eso.config.model import ModelConfig
from megatron_eso.config.sections import Config, ParallelConfig, TrainConfig, Vocabulary
from megatron_eso.model.eso_model import EsoModel
from megatron_eso.model.initialization import fill_rectangle, mark_split_parameters
from megatron_eso.model.transformer_config import build_transformer_config
from megatron_eso.randomness.purposes import INIT_VERSION
from megatron_eso.runs.counters import Counters, MovingStatistics
from megatron_eso.training.optimization.ema import ExponentialMovingAverage
from megatron_eso.training.optimization.main_parameters import (
    MainParameter,
    list_main_parameters,
    publish_main_parameters,
)
from megatron_eso.training.optimization.optimizer import build_optimizer, build_scheduler
from megatron_eso.training.optimization.tensor_parts import parts_to_read, share_values


@dataclass(kw_only=True, slots=True, eq=False)
class TrainState:
    """Model, optimizer, schedule, average and counters of this rank."""

    chunks: list[DistributedDataParallel]
    """This rank's parts of the model: one, or one for each virtual pipeline stage."""
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    parameters: list[MainParameter]
    ema: ExponentialMovingAverage | None
    counters: Counters
    losses: MovingStatistics
    """Statistics of the losses of the steps whose update was applied."""
    grad_norms: MovingStatistics
    """Statistics of the logarithms of their gradient norms."""
    init_version: int | None = None
    """Version of the initial weights; None if they were read, or drawn by version 1."""

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """Return the group of the data-parallel ranks."""
        group: dist.ProcessGroup = self.chunks[0].dp_cp_group
        return group


def build_train_state(config: Config, groups: ProcessGroupCollection) -> TrainState:
    """Build a fresh state with initial weights on this rank; collective over the world."""
    state = build_empty_state(config, groups)
    draw_weights(state, config)
    return state


@torch.no_grad()
def draw_weights(state: TrainState, config: Config) -> None:
    """Set the initial weights, and the moving average to them; collective over the world.

    A rank draws its ranges of the main parameters. Where data-parallel ranks hold the same ones,
    each draws some of them and sends those to the others.

    Args:
        state: The state, changed in place.
        config: The sections `model` and `run`.
    """
    mains = [parameter.main for parameter in state.parameters]
    for part in parts_to_read(state.parameters, mains, "", state.dp_group):
        fill_rectangle(
            part.values,
            part.key,
            part.global_shape,
            part.offsets,
            config=config.model,
            seed=config.run.seed,
        )
    share_values(state.parameters, mains, state.dp_group)
    publish_main_parameters(state.chunks, state.optimizer)
    if state.ema is not None:
        state.ema.restart()
    state.init_version = INIT_VERSION


def build_empty_state(config: Config, groups: ProcessGroupCollection) -> TrainState:
    """Build a state whose weights have no values yet on this rank; collective over the world."""
    model, vocabulary = config.model, config.data.vocabulary
    chunks = build_model_chunks(model, vocabulary, config.train, config.parallel, groups)
    precision, num_steps = config.train.precision, config.train.num_steps
    optimizer = build_optimizer(config.optimizer, config.parallel, precision, chunks, groups)
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    parameters = list_main_parameters(chunks, optimizer)
    decay = config.optimizer.ema_decay
    return TrainState(
        chunks=chunks,
        optimizer=optimizer,
        scheduler=build_scheduler(config.optimizer, num_steps, optimizer),
        parameters=parameters,
        ema=ExponentialMovingAverage(parameters, decay) if decay > 0 else None,
        counters=Counters(),
        losses=MovingStatistics(),
        grad_norms=MovingStatistics(),
    )


def build_model_chunks(
    model_config: ModelConfig,
    vocabulary: Vocabulary,
    train: TrainConfig,
    parallel: ParallelConfig,
    groups: ProcessGroupCollection,
) -> list[DistributedDataParallel]:
    """Build this rank's parts of the model without values, for bf16 and data parallelism.

    Args:
        model_config: The section `model`.
        vocabulary: The vocabulary of the shards.
        train: The section `train`: precision and recomputation.
        parallel: The section `parallel`: the layout.
        groups: The groups of this rank.
    """
    # Megatron-Core's options.
    transformer_config = build_transformer_config(model_config, parallel, train)
    transformer_config.finalize_model_grads_func = finalize_model_grads
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        check_for_nan_in_grad=False,
    )
    # One chunk, or one for each virtual pipeline stage.
    vp_size = parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in [None] if vp_size is None else range(vp_size):
        model = EsoModel(
            model_config,
            vocabulary,
            transformer_config,
            groups,
            pre_process=is_vp_first_stage(vp_stage, vp_size) and is_pp_first_stage(groups.pp),
            post_process=is_vp_last_stage(vp_stage, vp_size) and is_pp_last_stage(groups.pp),
            vp_stage=vp_stage,
        )
        mark_split_parameters(model)
        module = model.cuda(torch.cuda.current_device())
        if transformer_config.bf16:
            module = Float16Module(transformer_config, module)
        chunks.append(
            DistributedDataParallel(
                transformer_config,
                ddp_config,
                module,
                # The reduction of later chunks is not on the critical path.
                disable_bucketing=bool(vp_stage),
                pg_collection=groups,
            )
        )
    _sum_gradients(chunks)
    if parallel.overlap_grad_reduce:
        _overlap_reductions(transformer_config, chunks)
    return chunks


def _sum_gradients(chunks: list[DistributedDataParallel]) -> None:
    """Make the data-parallel reductions sums, as the loss is a sum over the samples.

    Megatron-Core would first multiply all gradients by 1 / DP: a pass over their memory, after
    which the loss would have to be multiplied by DP.
    """
    for chunk in chunks:
        for group in chunk.bucket_groups:
            for bucket in group.buckets:
                bucket.gradient_scaling_factor = 1.0


def _overlap_reductions(
    transformer_config: TransformerConfig, chunks: list[DistributedDataParallel]
) -> None:
    """Set the functions by which Megatron-Core's schedules reduce gradients during backward."""
    no_sync = [chunk.no_sync for chunk in chunks]
    is_interleaved = len(chunks) > 1
    transformer_config.no_sync_func = no_sync if is_interleaved else no_sync[0]
    grad_sync = [chunk.start_grad_sync for chunk in chunks]
    transformer_config.grad_sync_func = grad_sync if is_interleaved else None
