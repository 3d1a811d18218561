"""Reads of a checkpoint's stored tensors only the bytes that a rank needs.

torch stores a rectangle of a global tensor as one whole, and its own reader reads it whole for
every part that needs some of it. On another layout many ranks need a little of each.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import RawIOBase
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatron_eso.runs.torch_dist import SafeReader

Indices = tuple[int, ...]

LARGEST_READ = 2**24
"""Elements of the largest single read: it bounds the host memory of a load."""


@dataclass(frozen=True, slots=True)
class Read:
    """One contiguous read of a stored tensor, and what it fills of the wanted rectangle."""

    first: int
    """The number of the first element in the flattened stored tensor."""
    shape: Indices
    """The shape of the elements that are read."""
    source: tuple[slice, ...]
    """Which of them are wanted."""
    target: tuple[int | slice, ...]
    """Where the wanted elements belong in the rectangle."""


def list_reads(shape: Indices, offsets: Indices, sizes: Indices) -> Iterator[Read]:
    """List the reads that fill a rectangle of a stored tensor; they read at most twice its size.

    Args:
        shape: The shape of the stored tensor, whose elements lie in row-major order.
        offsets: The first element of the rectangle.
        sizes: The shape of the rectangle.
    """
    if not shape:
        yield Read(0, (), (), ())
        return
    dim = _count_outer(shape, sizes)
    inner = shape[dim + 1 :]
    row = math.prod(inner)
    strides = [math.prod(shape[each + 1 :]) for each in range(dim + 1)]
    rows_at_once = max(1, LARGEST_READ // max(row, 1))
    source = tuple(
        slice(start, start + size)
        for start, size in zip(offsets[dim + 1 :], sizes[dim + 1 :], strict=True)
    )
    for index in product(*map(range, sizes[:dim])):
        for begin in range(0, sizes[dim], rows_at_once):
            rows = min(rows_at_once, sizes[dim] - begin)
            place = [start + each for start, each in zip(offsets, (*index, begin), strict=False)]
            yield Read(
                first=sum(each * stride for each, stride in zip(place, strides, strict=True)),
                shape=(rows, *inner),
                source=(slice(None), *source),
                target=(*index, slice(begin, begin + rows)),
            )


def _count_outer(shape: Indices, sizes: Indices) -> int:
    """Return the dimension whose wanted range is one contiguous read; later ones are read whole.

    A later dimension of which not all is wanted is read whole as well where that joins many small
    reads, and as long as no more than twice the wanted elements are read.
    """
    dim, excess = len(shape) - 1, 1.0
    while dim > 0:
        is_whole = sizes[dim] == shape[dim]
        is_worth_it = math.prod(sizes[:dim]) > 1 and excess * shape[dim] <= 2 * sizes[dim]
        if not (is_whole or is_worth_it):
            break
        excess *= shape[dim] / sizes[dim]
        dim -= 1
    return dim


class RangeReader(SafeReader):
    """A reader of checkpoints that reads byte ranges of the stored tensors."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the items of a plan.

        Raises:
            OSError: A file is missing, or shorter than the index states.
        """
        # Items by file, in the order of the file.
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._place(item).relative_path, []).append(item)
        # What is not stored as one contiguous tensor is left to torch.
        others: list[ReadItem] = []
        for name, items in by_file.items():
            with (self._directory / name).open("rb", buffering=0) as file:
                for item in sorted(items, key=lambda item: self._place(item).offset):
                    if not self._fill(file, item, planner):
                        others.append(item)
        return super().read_data(LoadPlan(others), planner)

    def _place(self, item: ReadItem) -> Any:
        """Return torch's record of the file, and of the range in it, of the tensor of an item."""
        return self.storage_data[item.storage_index]

    def _fill(self, file: RawIOBase, item: ReadItem, planner: LoadPlanner) -> bool:
        """Fill one item, and return whether that was possible by reading a range."""
        place = self._place(item)
        if place.transform_descriptors:
            return False
        # On the meta device a tensor is described without being read.
        view = self._slice_file(file, place)
        stored = torch.load(view, map_location="meta", weights_only=True)
        start = getattr(stored.untyped_storage(), "_checkpoint_offset", None)
        if start is None or not stored.is_contiguous():
            return False
        start += place.offset + stored.storage_offset() * stored.element_size()
        # The ranges.
        values = planner.resolve_tensor(item).detach()
        for read in list_reads(
            tuple(stored.shape), tuple(item.storage_offsets), tuple(item.lengths)
        ):
            found = torch.empty(read.shape, dtype=stored.dtype)
            file.seek(start + read.first * stored.element_size())
            _read_into(file, found)
            values[read.target].copy_(found[read.source])
        planner.commit_tensor(item, values)
        return True


def _read_into(file: RawIOBase, tensor: Tensor) -> None:
    """Fill a tensor from the position of a file."""
    buffer = tensor.view(-1).view(torch.uint8).numpy().data
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise EOFError("the file ends within a tensor")
        buffer = buffer[count:]
