"""Ranges of flattened tensors as rectangles."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_eso.training.optimization.tensor_parts import cut_range


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_rectangles_hold_just_the_range(shape: list[int], ends: tuple[float, float]) -> None:
    size = math.prod(shape)
    low, high = sorted(round(end * size) for end in ends)
    elements = np.arange(size).reshape(shape)
    found: list[int] = []
    rectangles = list(cut_range(shape, low, high))
    for offsets, sizes, start in rectangles:
        window = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        block = elements[window]
        assert block.shape == tuple(sizes)
        assert block.flat[0] == start
        found += block.ravel().tolist()
    assert found == list(range(low, high))
    assert len(rectangles) <= 2 * len(shape) - 1
