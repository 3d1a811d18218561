"""Measures, clips and applies the gradients of a step, without a wait for the GPU."""

import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor


@torch.no_grad()
def measure_gradients(optimizer: ChainedOptimizer, groups: ProcessGroupCollection) -> Tensor:
    """Return what this rank adds to the gradient's norm, and whether its gradients are finite.

    The sum over the world has the square of the whole gradient's norm and the number of ranks whose
    gradients are not all finite. Several ranks hold the same gradients: tensor-parallel ranks of
    the parameters that they do not split, and data-parallel ranks without the distributed
    optimizer. Their first rank adds them to the norm, but every rank checks its own copies.

    Args:
        optimizer: The optimizer; its gradients must be ready (`prepare_grads`).
        groups: The groups of this rank.

    Returns:
        Float64 `[2]` on the GPU: a sum of squares, and 1 if a gradient is not finite, else 0.
    """
    counted: list[Tensor] = []
    copies: list[Tensor] = []
    is_first = optimizer.config.use_distributed_optimizer or groups.dp_cp.rank() == 0
    for part in optimizer.chained_optimizers:
        of_norm = {id(gradient) for gradient in part.get_main_grads_for_grad_norm()}
        for parameter in part.get_parameters():
            if parameter.grad is not None:
                is_counted = is_first and id(parameter.grad) in of_norm
                (counted if is_counted else copies).append(parameter.grad)
    norms_C, norms_D = _measure_norms(counted), _measure_norms(copies)
    num_bad = (~torch.cat([norms_C, norms_D]).isfinite()).any().double()
    return torch.stack([norms_C.square().sum(), num_bad])


def _measure_norms(gradients: list[Tensor]) -> Tensor:
    """Return the norm of each gradient, float64."""
    if not gradients:
        return torch.zeros(0, dtype=torch.float64, device=torch.cuda.current_device())
    return torch.stack(torch._foreach_norm(gradients)).double()


@torch.no_grad()
def apply_gradients(optimizer: ChainedOptimizer, grad_norm: float) -> None:
    """Clip the gradients by their norm, and update the parameters; collective over the world.

    Args:
        optimizer: The optimizer; its gradients must be ready (`prepare_grads`).
        grad_norm: The norm of the whole gradient.
    """
    max_norm = optimizer.config.clip_grad
    scale = max_norm / (grad_norm + 1e-6)  # as in Megatron-Core
    if max_norm > 0 and scale < 1:
        parameters = [p for part in optimizer.chained_optimizers for p in part.get_parameters()]
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], scale)
    optimizer.step_with_ready_grads()
