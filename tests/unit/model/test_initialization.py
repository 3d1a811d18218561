"""Initial values: functions of seed, name and element, whatever a rank holds of a tensor."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_eso.config.model import ModelConfig
from megatron_eso.model import initialization
from megatron_eso.model.initialization import fill_rectangle
from megatron_eso.randomness.bits import random_bits
from megatron_eso.randomness.purposes import INIT_VERSION, Purpose

CONFIG = ModelConfig(num_layers=8, hidden_size=16, num_attention_heads=2, init_method_std=0.5)
PINNED = [
    [-0.33737605810165405, -0.7419324517250061, 0.9322165250778198],
    [-0.35180366039276123, 0.21481022238731384, -0.1642637848854065],
]
NAME = "decoder.layers.3.self_attention.linear_qkv.weight"


def draw(
    shape: tuple[int, ...],
    offsets: tuple[int, ...] | None = None,
    sizes: tuple[int, ...] | None = None,
    name: str = NAME,
    seed: int = 7,
) -> torch.Tensor:
    values = torch.full(sizes or shape, math.nan)
    start = offsets or (0,) * len(shape)
    fill_rectangle(values, name, shape, start, config=CONFIG, seed=seed)
    return values


def test_version_2_stays_as_it_is() -> None:
    """A change of any of these values needs a new INIT_VERSION."""
    assert INIT_VERSION == 2
    assert draw((2, 3)).tolist() == PINNED
    tied = draw((2, 3), name="embedding.word_embeddings.weight")
    assert not torch.equal(tied, draw((2, 3)))
    assert not torch.equal(draw((2, 3), seed=8), draw((2, 3)))


@given(
    dims=st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=3
    )
)
def test_a_rectangle_is_that_of_the_whole(dims: list[tuple[int, int, int]]) -> None:
    """Each dimension by what comes before the rectangle, its size, and what comes after it."""
    shape = tuple(map(sum, dims))
    offsets, sizes = tuple(before for before, _, _ in dims), tuple(size for _, size, _ in dims)
    window = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
    assert torch.equal(draw(shape, offsets, sizes), draw(shape)[window])


def test_large_rectangles_too() -> None:
    shape = (3, initialization.AT_ONCE + 77)
    whole = draw(shape)
    assert torch.equal(draw(shape, (1, 0), (2, shape[1])), whole[1:])
    assert torch.equal(draw(shape, (0, 5), (3, shape[1] - 9)), whole[:, 5:-4])
    assert torch.equal(draw((5, shape[1]), (0, 0), shape), whole)  # more rows change nothing


def test_values_are_normal() -> None:
    values = draw((1000, 1000)).double().flatten()
    size = len(values)
    assert abs(values.mean()) < 5 * 0.5 / math.sqrt(size)
    assert abs(values.std() - 0.5) < 5 * 0.5 / math.sqrt(2 * size)
    expected = torch.special.ndtr(values.sort().values / 0.5)
    distance = (expected - (torch.arange(size) + 0.5) / size).abs().max()
    assert distance < 2.0 / math.sqrt(size)  # Kolmogorov-Smirnov, p < 1e-3
    neighbours = (values[1:] * values[:-1]).mean() / 0.25
    assert abs(neighbours) < 5 / math.sqrt(size)


def test_what_is_not_normal_is_as_stated() -> None:
    assert draw((4,), name="decoder.final_layernorm.weight").tolist() == [1.0] * 4
    assert draw((4,), name="decoder.layers.0.mlp.linear_fc1.bias").tolist() == [0.0] * 4
    branch = draw((500, 500), name="decoder.layers.0.mlp.linear_fc2.weight")
    assert abs(float(branch.std()) - 0.5 / 4) < 1e-3  # sqrt(2 * 8 layers) = 4


def test_words_may_begin_anywhere() -> None:
    words = random_bits(1, Purpose.INITIAL_WEIGHT, 2, 20)
    for first in range(10):
        found = random_bits(1, Purpose.INITIAL_WEIGHT, 2, 9, first=first)
        assert np.array_equal(found, words[first : first + 9])
