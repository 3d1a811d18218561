"""Draws initial values as a function of seed, global name and element: on every layout the same.

Megatron-Core's own initialization depends on the pipeline layout.
"""

import hashlib
import math
from collections.abc import Iterator
from itertools import product

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from numpy.typing import NDArray
from torch import Tensor

from megatron_eso.config.model import ModelConfig
from megatron_eso.model.eso_model import EsoModel
from megatron_eso.model.sharding import shard_parameters
from megatron_eso.randomness.bits import random_bits
from megatron_eso.randomness.purposes import Purpose

BRANCH_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")
AT_ONCE = 2**16
"""Values that are computed at once: few enough for the cache of a core."""

Indices = tuple[int, ...]


def mark_split_parameters(model: EsoModel) -> None:
    """Mark the parameters that tensor-parallel ranks split; before the optimizer is built.

    Megatron-Core's own initialization sets this mark. Without it, the gradient's norm counts the
    parameter on the first tensor-parallel rank only.
    """
    for parameter, sharded in shard_parameters(model):
        parts = sharded.build() if isinstance(sharded, ShardedTensorFactory) else [sharded]
        if parts[0].local_shape != parts[0].global_shape:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


@torch.no_grad()
def fill_rectangle(
    values: Tensor,
    name: str,
    shape: Indices,
    offsets: Indices,
    *,
    config: ModelConfig,
    seed: int,
) -> None:
    """Fill a rectangle of a parameter with its initial values; nothing else of it is drawn.

    Norms are the identity, biases and residual gates are zero, weights are normal with
    `init_method_std`. As in Megatron-Core, the output weights of the residual branches are scaled
    by 1 / sqrt(2 num_layers). They are not scaled where gates close the branches at the start.

    Args:
        values: The rectangle, float32 and contiguous.
        name: The global name of the parameter, with the number of the layer.
        shape: The global shape of the parameter.
        offsets: The first element of the rectangle.
        config: The section `model`.
        seed: The run's seed.
    """
    if name.endswith(("norm.weight", "norm_weight")):
        values.fill_(1)
        return
    is_closed = name == "output_layer.weight" and config.zero_init_head
    if name.endswith(("bias", ".gate")) or is_closed:
        values.zero_()
        return
    std = config.init_method_std
    if name.endswith(BRANCH_OUTPUTS) and not config.residual_gates:
        std /= math.sqrt(2 * config.num_layers)
    # The number of a value is that of its element in the flattened parameter.
    stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    flat, done = values.view(-1), 0
    for runs in _group_runs(shape, offsets, tuple(values.shape)):
        words = np.concatenate([_draw(seed, stream, first, count) for first, count in runs])
        flat[done : done + len(words)].copy_(_to_normal(words, std))
        done += len(words)


def _group_runs(
    shape: Indices, offsets: Indices, sizes: Indices
) -> Iterator[list[tuple[int, int]]]:
    """List the runs of a rectangle in the flattened tensor, as first element and length.

    Yields:
        The next ones, of `AT_ONCE` elements together where there are as many.
    """
    # Dimensions after `dim` are whole, so that a run has several rows of them.
    dim = len(shape) - 1
    while dim > 0 and sizes[dim] == shape[dim]:
        dim -= 1
    strides = [math.prod(shape[each + 1 :]) for each in range(len(shape))]
    length = sizes[dim] * strides[dim]
    runs: list[tuple[int, int]] = []
    together = 0
    for index in product(*map(range, sizes[:dim])):
        place = (*(start + each for start, each in zip(offsets, index, strict=False)), offsets[dim])
        first = sum(each * stride for each, stride in zip(place, strides, strict=False))
        for begin in range(0, length, AT_ONCE):
            count = min(AT_ONCE, length - begin)
            runs.append((first + begin, count))
            together += count
            if together >= AT_ONCE:
                yield runs
                runs, together = [], 0
    if runs:
        yield runs


def _draw(seed: int, stream: int, first: int, count: int) -> NDArray[np.int32]:
    """Return the random bits of `count` elements of a stream; two elements share a word."""
    skipped = first % 2
    num_words = (skipped + count + 1) // 2
    words = random_bits(seed, Purpose.INITIAL_WEIGHT, stream, num_words, first=first // 2)
    return words.astype("<u8", copy=False).view("<i4")[skipped : skipped + count]


def _to_normal(bits: NDArray[np.int32], std: float) -> Tensor:
    """Return float32 normal values of mean 0: the quantiles of evenly distributed integers.

    They are computed in float64, where library functions differ by less than float32 resolves.
    """
    uniform = torch.from_numpy(bits).double().add_(0.5).mul_(2.0**-31)  # in (-1, 1)
    return uniform.erfinv_().mul_(std * math.sqrt(2)).float()
