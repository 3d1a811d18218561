"""Lists the float32 main parameters of any of Megatron-Core's optimizers in one form.

Megatron-Core keeps main parameters in three ways: as the model's own tensors (float32), as whole
float32 copies (bf16), and as ranges of flattened parameters that the data-parallel ranks share
(distributed optimizer). Here each one is a range of a flattened model parameter. So EMA and
checkpoints need no code of their own for each way, and any optimizer reads any checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.nn import Parameter

from megatron_eso.model.sharding import Sharded, shard_parameters


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MainParameter:
    """This rank's range of the main parameter that belongs to one model parameter."""

    model: Parameter
    """The parameter that the network computes with."""
    sharded: Sharded
    """The global name of the parameter, and which part of the global tensor `model` is."""
    main: Tensor | None
    """The float32 values of the range, which `inner` updates; None if the range is empty."""
    start: int
    """The first element of the range in the flattened model parameter."""
    end: int
    """The element after the last one of the range."""
    inner: torch.optim.Optimizer
    """The optimizer that updates `main`."""
    is_sharded: bool
    """Whether the data-parallel ranks hold different ranges; else each rank holds all elements."""


def list_main_parameters(
    chunks: list[DistributedDataParallel], optimizer: ChainedOptimizer
) -> list[MainParameter]:
    """List every parameter of this rank's model chunks; no communication.

    The order is the same on all data-parallel ranks.
    """
    (part,) = optimizer.chained_optimizers
    find = _finder(part)
    found = []
    for chunk in chunks:
        for parameter, sharded in shard_parameters(unwrap_model(chunk)):
            main, start, end = find(parameter)
            found.append(
                MainParameter(
                    model=parameter,
                    sharded=sharded,
                    main=main,
                    start=start,
                    end=end,
                    inner=part.optimizer,
                    is_sharded=isinstance(part, DistributedOptimizer),
                )
            )
    return found


Range = tuple[Tensor | None, int, int]


def _finder(part: MegatronOptimizer) -> Callable[[Parameter], Range]:
    """Return the function that finds a parameter's range in one of Megatron-Core's optimizers."""

    def find_model(parameter: Parameter) -> Range:
        return parameter, 0, parameter.numel()

    def find_copy(parameter: Parameter) -> Range:
        return parameter.main_param, 0, parameter.numel()  # type: ignore[attr-defined]

    def find_shard(parameter: Parameter) -> Range:
        if parameter not in part.model_param_group_index_map:
            return None, 0, 0
        group, order = part.model_param_group_index_map[parameter]
        place = part._get_model_param_range_map(parameter)["param"]
        return part.optimizer.param_groups[group]["params"][order], place.start, place.end

    if isinstance(part, DistributedOptimizer):
        return find_shard
    return find_model if isinstance(part, FP32Optimizer) else find_copy


@torch.no_grad()
def publish_main_parameters(
    chunks: list[DistributedDataParallel], optimizer: ChainedOptimizer
) -> None:
    """Copy the main parameters to the network's parameters; collective over DP."""
    for part in optimizer.chained_optimizers:
        if not isinstance(part, FP32Optimizer):
            part._copy_main_params_to_model_params()
    synchronize_parameters(chunks)


def synchronize_parameters(chunks: list[DistributedDataParallel]) -> None:
    """Gather the distributed optimizer's ranges into every rank's model; collective over DP.

    With overlapped gathering the model otherwise holds the weights of the previous step until its
    next forward.
    """
    for chunk in chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)
