"""Draws initial values as a function of seed and global name: every layout has the same ones.

Megatron-Core's own initialization depends on the pipeline layout.
"""

import hashlib
import math

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_eso.config.model import ModelConfig
from megatron_eso.model.eso_model import EsoModel
from megatron_eso.model.sharding import shard_parameters

BRANCH_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialize_parameters(model: EsoModel, config: ModelConfig, seed: int) -> None:
    """Fill the parameters of this rank, without communication.

    Args:
        model: One stage's part of the network.
        config: The section `model`.
        seed: The run's seed.
    """
    for parameter, sharded in shard_parameters(model):
        parts = sharded.build() if isinstance(sharded, ShardedTensorFactory) else [sharded]
        for part in parts:
            assert isinstance(part, ShardedTensor)
            place = zip(part.global_offset, part.local_shape, strict=True)
            index = tuple(slice(start, start + size) for start, size in place)
            whole = draw_parameter(part.key, part.global_shape, config, seed)
            part.data.copy_(whole[index])
        if parts[0].local_shape != parts[0].global_shape:
            # Megatron-Core's own initialization sets this mark. Without it, the gradient's norm
            # counts the parameter on the first tensor-parallel rank only.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        assert parameter.isfinite().all(), sharded.key


def draw_parameter(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """Draw the initial value of the whole parameter `name`, float32.

    Norms are the identity, biases and residual gates are zero, weights are normal with
    `init_method_std`. As in Megatron-Core, the output weights of the residual branches are scaled
    by 1 / sqrt(2 num_layers). They are not scaled where gates close the branches at the start.

    Args:
        name: Global name, with the number of the layer.
        shape: Global shape.
        config: The section `model`.
        seed: The run's seed.
    """
    if name.endswith(("norm.weight", "norm_weight")):
        return torch.ones(shape)
    if name.endswith(("bias", ".gate")):
        return torch.zeros(shape)
    if name == "output_layer.weight" and config.zero_init_head:
        return torch.zeros(shape)
    std = config.init_method_std
    if name.endswith(BRANCH_OUTPUTS) and not config.residual_gates:
        std /= math.sqrt(2 * config.num_layers)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
