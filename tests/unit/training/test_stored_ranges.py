"""Rectangles of stored tensors by contiguous reads."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_eso.training.checkpointing.stored_ranges import list_reads


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6), st.integers(0, 6)), max_size=4))
def test_reads_fill_just_the_rectangle(dims: list[tuple[int, int, int]]) -> None:
    """Each dimension by what comes before the rectangle, its size, and what comes after it."""
    shape = tuple(map(sum, dims))
    offsets, sizes = tuple(before for before, _, _ in dims), tuple(size for _, size, _ in dims)
    stored = np.arange(math.prod(shape)).reshape(shape)
    found = np.full(sizes, -1)
    num_read = 0
    for read in list_reads(shape, offsets, sizes):
        size = math.prod(read.shape)
        elements = stored.reshape(-1)[read.first : read.first + size]
        assert len(elements) == size
        found[read.target] = elements.reshape(read.shape)[read.source]
        num_read += size
    assert np.array_equal(
        found, stored[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
    )
    assert num_read <= 2 * found.size


def test_many_small_reads_are_joined_where_half_is_wanted() -> None:
    assert len(list(list_reads((100, 8), (10, 0), (50, 4)))) == 1
    assert len(list(list_reads((100, 8), (10, 0), (50, 2)))) == 50
    assert len(list(list_reads((100, 8), (10, 0), (50, 8)))) == 1
