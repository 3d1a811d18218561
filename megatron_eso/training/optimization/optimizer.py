"""Builds the optimizer and its learning-rate schedule from Megatron-Core's, and applies updates."""

import math
from collections.abc import Callable

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_eso.config.sections import OptimizerConfig, ParallelConfig
from megatron_eso.model.transformer_config import PARAMS_DTYPE
from megatron_eso.training.distributed.parallel import max_over_world

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


@torch.no_grad()
def update_parameters(
    optimizer: ChainedOptimizer, accept: Callable[[float], bool]
) -> tuple[float, bool]:
    """Clip and apply the gradients, unless they are not finite or not accepted.

    Collective over the world.

    Megatron-Core would apply gradients that are not finite where no loss scaler is in use.

    Args:
        optimizer: To step.
        accept: Whether to apply the update, given the gradient norm; the same on every rank.

    Returns:
        The norm of the whole gradient before clipping, and whether the update was applied. All
        ranks agree: the norm is reduced over every rank that holds another part of the gradient.
    """
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    (has_bad_copy,) = max_over_world(not are_copies_finite(optimizer))
    if has_bad_copy:
        grad_norm = math.nan
    if not (math.isfinite(grad_norm) and accept(grad_norm)):
        return grad_norm, False
    max_norm = optimizer.config.clip_grad
    if max_norm > 0:
        for part in optimizer.chained_optimizers:
            clip_grad_by_total_norm_fp32(
                part.get_parameters(), max_norm=max_norm, total_norm=grad_norm
            )
    optimizer.step_with_ready_grads()
    return grad_norm, True


def are_copies_finite(optimizer: ChainedOptimizer) -> bool:
    """Whether those of this rank's gradients are finite that the norm leaves out.

    Tensor-parallel ranks have parameters in common, and the norm counts them on the first rank
    only: without this check, a value that is not finite on another rank would be applied.
    """
    copies = []
    for part in optimizer.chained_optimizers:
        counted = {id(gradient) for gradient in part.get_main_grads_for_grad_norm()}
        gradients = [parameter.grad for parameter in part.get_parameters()]
        copies += [each for each in gradients if each is not None and id(each) not in counted]
    if not copies:
        return True
    return bool(torch.stack(torch._foreach_norm(copies)).isfinite().all())
