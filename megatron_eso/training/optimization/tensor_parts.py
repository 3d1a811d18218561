"""Lists the parts of global tensors that a rank holds: those that it writes and those it reads.

A rank holds ranges of flattened parameters (main_parameters.py). A range of a flattened matrix is
at most three rectangles of it: the rest of a row, whole rows, the beginning of a row. torch's
distributed checkpoints store rectangles. So every rank writes only what it holds and reads only
what it needs, on any layout, and nothing is gathered. Megatron-Core's own format first gathers the
distributed optimizer's state on every data-parallel rank.
"""

import dataclasses
import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_eso.training.optimization.main_parameters import MainParameter

Indices = tuple[int, ...]
"""One number for each dimension: offsets, sizes or a shape."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorPart:
    """A rectangle of a global float32 tensor, and this rank's values of it."""

    key: str
    global_shape: Indices
    offsets: Indices
    values: Tensor
    """Values in the rectangle's shape; a view of the rank's state, which reading fills."""

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Return offsets and sizes in torch's type."""
        return ChunkStorageMetadata(torch.Size(self.offsets), self.values.shape)


def parts_to_write(
    parameters: list[MainParameter],
    values: list[Tensor | None],
    prefix: str,
    dp_group: dist.ProcessGroup,
) -> Iterator[TensorPart]:
    """List the parts of one kind of state that this rank writes; no communication.

    Over all ranks every element is listed once. Data-parallel ranks that hold the same values
    divide the parameters among them. Of tensor-parallel ranks that hold the same values, and of the
    copies of a tied embedding, the first one writes.

    Args:
        parameters: The main parameters, in the same order on every rank of the group.
        values: For each parameter this rank's range of the state, in the shape of `main`.
        prefix: What the keys of this kind of state begin with.
        dp_group: The data-parallel group.
    """
    for parameter, value in _list_own(parameters, values, dp_group):
        yield from _cut(parameter, value, prefix, only_first_replica=True)


def parts_to_read(
    parameters: list[MainParameter],
    values: list[Tensor | None],
    prefix: str,
    dp_group: dist.ProcessGroup,
) -> Iterator[TensorPart]:
    """List the parts of one kind of state that this rank reads; no communication.

    Data-parallel ranks that hold the same values divide the parameters, as in `parts_to_write`,
    which has the same arguments. `share_values` then gives all of them the values.
    """
    for parameter, value in _list_own(parameters, values, dp_group):
        yield from _cut(parameter, value, prefix, only_first_replica=False)


def _list_own(
    parameters: list[MainParameter], values: list[Tensor | None], dp_group: dist.ProcessGroup
) -> Iterator[tuple[MainParameter, Tensor]]:
    """List the parameters, with their values, that this data-parallel rank writes or reads."""
    owners = _choose_owners(parameters, dp_group.size())
    for parameter, value, owner in zip(parameters, values, owners, strict=True):
        is_own = parameter.is_sharded or owner == dp_group.rank()
        if value is not None and is_own:
            yield parameter, value


def _choose_owners(parameters: list[MainParameter], num_ranks: int) -> list[int]:
    """Return the data-parallel rank that writes or reads each parameter that all of them hold.

    The next parameter goes to the rank that has the fewest elements so far.
    """
    loads = [(0, rank) for rank in range(num_ranks)]
    owners = []
    for parameter in parameters:
        load, rank = loads[0]
        owners.append(rank)
        heapq.heapreplace(loads, (load + parameter.model.numel(), rank))
    return owners


def share_values(
    parameters: list[MainParameter], values: list[Tensor | None], dp_group: dist.ProcessGroup
) -> None:
    """Send what a rank has read to those that hold the same; collective over the group.

    Arguments as for `parts_to_write`.
    """
    if dp_group.size() == 1:
        return
    owners = _choose_owners(parameters, dp_group.size())
    for parameter, value, owner in zip(parameters, values, owners, strict=True):
        if value is not None and not parameter.is_sharded:
            dist.broadcast(value.detach(), group=dp_group, group_src=owner)


def _cut(
    parameter: MainParameter, value: Tensor, prefix: str, *, only_first_replica: bool
) -> Iterator[TensorPart]:
    flat = value.view(-1)
    for tensor in _list_tensors(parameter):
        # The last number is the data-parallel rank, which the caller has considered.
        if only_first_replica and any(_as_tuple(tensor.replica_id)[:-1]):
            continue
        assert tensor.data is not None
        first = tensor.data.storage_offset()
        low = max(parameter.start, first)
        high = min(parameter.end, first + tensor.data.numel())
        for offsets, sizes, start in cut_range(tensor.data.shape, low - first, high - first):
            begin = first + start - parameter.start
            yield TensorPart(
                prefix + tensor.key,
                tuple(tensor.global_shape),
                tuple(map(sum, zip(tensor.global_offset, offsets, strict=True))),
                flat[begin : begin + math.prod(sizes)].view(sizes),
            )


def _list_tensors(parameter: MainParameter) -> list[ShardedTensor]:
    """List the rank's rectangles of global tensors in a parameter, with data on the meta device.

    The storage offset of the data is its first element in the flattened parameter. A parameter has
    several where Megatron-Core joins tensors: a SwiGLU's gate and its linear part.
    """
    sharded = parameter.sharded
    whole = torch.empty(parameter.model.shape, device="meta")
    if isinstance(sharded, ShardedTensor):
        tensors = [dataclasses.replace(sharded, data=whole, dtype=whole.dtype)]
    else:
        built = sharded.build_fn(sharded.key, whole, sharded.replica_id, None)
        tensors = list(nested_values(built if isinstance(built, dict) else dict(enumerate(built))))
    for tensor in tensors:
        assert tensor.data.is_contiguous()
        assert tensor.prepend_axis_num == 0
    return tensors


def cut_range(shape: Iterable[int], low: int, high: int) -> Iterator[tuple[Indices, Indices, int]]:
    """Cut elements [low, high) of a flattened tensor into rectangles of the tensor, in order.

    Yields:
        Offsets and sizes of a rectangle, and the number of its first element in the flattened
        tensor.
    """
    _, *inner = shape
    if low >= high:
        return
    if not inner:
        yield (low,), (high - low,), low
        return
    row = math.prod(inner)
    rows_begin = min(high, -(-low // row) * row)
    num_rows = (high - rows_begin) // row
    rows_end = rows_begin + num_rows * row
    yield from _cut_row(inner, low // row, low, rows_begin)
    if num_rows:
        yield (rows_begin // row, *(0 for _ in inner)), (num_rows, *inner), rows_begin
    yield from _cut_row(inner, rows_end // row, rows_end, high)


def _cut_row(
    inner: list[int], number: int, low: int, high: int
) -> Iterator[tuple[Indices, Indices, int]]:
    """Cut a range of one row into rectangles."""
    first = number * math.prod(inner)
    for offsets, sizes, start in cut_range(inner, low - first, high - first):
        yield (number, *offsets), (1, *sizes), first + start


def _as_tuple(replica_id: Any) -> tuple[int, ...]:
    return replica_id if isinstance(replica_id, tuple) else (replica_id,)
