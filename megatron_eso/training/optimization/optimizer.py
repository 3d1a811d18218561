"""Builds the optimizer and its learning-rate schedule from Megatron-Core's."""

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_eso.config.sections import OptimizerConfig, ParallelConfig
from megatron_eso.model.transformer_config import PARAMS_DTYPE

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The names of the tensors that Adam keeps for each parameter."""


def build_optimizer(
    optimizer: OptimizerConfig,
    parallel: ParallelConfig,
    precision: str,
    chunks: list[DistributedDataParallel],
    pg_collection: ProcessGroupCollection,
) -> ChainedOptimizer:
    """Build AdamW with float32 main parameters over the chunks; collective over the world.

    Args:
        optimizer: The section `optimizer`.
        parallel: The section `parallel`: whether the optimizer is distributed.
        precision: `train.precision` of the run.
        chunks: This rank's parts of the model.
        pg_collection: The groups of this rank.
    """
    optimizer_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.learning_rate,
        min_lr=optimizer.min_learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=precision == "bf16",
        params_dtype=PARAMS_DTYPE[precision],
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    # None exempts biases and one-dimensional parameters from weight decay, {} exempts nothing.
    excludes = optimizer.weight_decay_exclude == "biases_and_norms"
    built = get_megatron_optimizer(
        optimizer_config,
        chunks,
        config_overrides=None if excludes else {},
        use_gloo_process_groups=False,
        pg_collection=pg_collection,
    )
    assert isinstance(built, ChainedOptimizer)
    return built


def build_scheduler(
    section: OptimizerConfig, num_steps: int, optimizer: ChainedOptimizer
) -> OptimizerParamScheduler:
    """Build the schedule of the learning rate, a function of the number of steps taken.

    Args:
        section: The section `optimizer`: the schedule.
        num_steps: The number of steps of the run; the schedule ends with it.
        optimizer: The optimizer whose learning rate the schedule sets.
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.learning_rate,
        min_lr=section.min_learning_rate,
        lr_warmup_steps=section.lr_warmup_steps,
        lr_decay_steps=num_steps,
        lr_decay_style=section.lr_decay_style,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
        wsd_decay_steps=section.lr_wsd_decay_steps,
        lr_wsd_decay_style="linear",
    )
