"""A micro-batch as a list of (token, position) rows instead of a dense mask.

Consecutive rows that read in the same way are a *span*. A row reads the first keys of one stream of
rows, and a run of rows of its own:

- CAUSAL: each row reads the rows of the span up to itself.
- FULL: each row reads all rows of the span.
- STRICT: each row reads a growing part of another stream, and itself. The last row of the span
  reads `num_keys` keys, each row before it one key less.
- BLOCK: each row reads the same part of a stream, and a block of rows that holds it.

Shapes: B samples, R rows, E loss rows. `reads_4R` has four numbers for each row: the first key of
its stream and the number of keys that it reads; the first row of its own run and their number.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


class Reading(Enum):
    """How the rows of a span read; the docstring of this file defines the values."""

    CAUSAL = "causal"
    FULL = "full"
    STRICT = "strict"
    BLOCK = "block"


STREAMS = (Reading.CAUSAL, Reading.FULL)
"""Readings of rows that are streams themselves."""


class Span(NamedTuple):
    """Consecutive rows that read in the same way.

    The rows of a CAUSAL or FULL span are the stream that it reads.
    """

    reading: Reading
    num_rows: int
    first_key: int
    """First row of the stream."""
    num_keys: int
    """Keys of the stream that the last row reads; for BLOCK without those of its block."""
    first_own: int = 0
    """First row of the block; used for BLOCK only."""
    num_own: int = 0
    """Rows of the block; used for BLOCK only."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """The rows that a network reads, and what each of them reads.

    Tensors are on one device; spans are Python integers. A sample without a masked token carries
    no loss and has no rows.

    Attributes:
        tokens_R: int64, token of each row: the mask token for masked slots, queries and padding.
        positions_R: int64, position of each token in the text; 0 for padding.
        reads_4R: int64, what each row reads; zeros for padding, which reads nothing.
        loss_rows_E: int64, number of each loss row among the rows, ascending, then padding (0).
        spans: The spans of all layers except the last, in the order of the rows.
        loss_spans: The spans of the last layer, in the order of the loss rows.
    """

    tokens_R: Tensor
    positions_R: Tensor
    reads_4R: Tensor
    loss_rows_E: Tensor
    spans: tuple[Span, ...]
    loss_spans: tuple[Span, ...]

    @property
    def num_rows(self) -> int:
        """Rows without padding."""
        return sum(span.num_rows for span in self.spans)

    @property
    def num_loss_rows(self) -> int:
        """Loss rows without padding."""
        return sum(span.num_rows for span in self.loss_spans)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LossRows:
    """The targets of the loss rows of a micro-batch, and their weights.

    Attributes:
        targets_E: int64, the token to predict; 0 for padding.
        weights_E: float32, weight in the objective; 0 for padding.
        elbo_weights_E: float32, weight in the NELBO; 0 for padding.
        phase_E: int64, number of the phase; 0 for padding.
        sample_E: int64, number of each loss row's sample in the micro-batch; 0 for padding.
        lengths: Loss rows of each run of one sample; a sample has at most two runs.
    """

    targets_E: Tensor
    weights_E: Tensor
    elbo_weights_E: Tensor
    phase_E: Tensor
    sample_E: Tensor
    lengths: tuple[int, ...]

    @property
    def num_real(self) -> int:
        """Loss rows without padding."""
        return sum(self.lengths)


Kind = TypeVar("Kind", Rows, LossRows)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroBatch:
    """The input of one forward pass.

    Attributes:
        rows: The rows that the network reads.
        loss: The targets of its loss rows.
        indices_B: int64, global indices of the samples. In validation, indices in the set; each
            sample comes once for each phase.
        phase_B: int64, phase of each sample.
        block: uint8, the memory that all tensors are views of; None if each has its own.
    """

    rows: Rows
    loss: LossRows
    indices_B: NDArray[np.int64]
    phase_B: NDArray[np.int64]
    block: Tensor | None = None

    def to(self, device: torch.device | str) -> Self:
        """Return the micro-batch with its tensors on a device; a packed one is copied at once."""
        if self.block is not None:
            return self._view(self.block.to(device, non_blocking=True))
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pack(self) -> Self:
        """Return the micro-batch with all tensors in one block of memory."""
        tensors = [*_find_tensors(self.rows).values(), *_find_tensors(self.loss).values()]
        return self._view(torch.cat([_fill_up(tensor) for tensor in tensors]))

    def pin_memory(self) -> Self:
        """Return the micro-batch in pinned memory; `to` then copies it to a GPU without waiting."""
        packed = self.pack()
        assert packed.block is not None
        return packed._view(packed.block.pin_memory())

    def pad(self, row_multiple: int, mask_token_id: int) -> Self:
        """Return the micro-batch with rows and loss rows padded to a positive multiple."""
        rows, loss = self.rows, self.loss
        missing_R = _count_missing(len(rows.tokens_R), row_multiple)
        missing_E = _count_missing(len(rows.loss_rows_E), row_multiple)
        if missing_R == missing_E == 0:
            return self
        padded = replace(
            rows,
            tokens_R=functional.pad(rows.tokens_R, (0, missing_R), value=mask_token_id),
            positions_R=functional.pad(rows.positions_R, (0, missing_R)),
            reads_4R=functional.pad(rows.reads_4R, (0, missing_R)),
            loss_rows_E=functional.pad(rows.loss_rows_E, (0, missing_E)),
        )
        padded_loss = _map_tensors(loss, lambda tensor: functional.pad(tensor, (0, missing_E)))
        return replace(self, rows=padded, loss=padded_loss, block=None)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        rows, loss = _map_tensors(self.rows, change), _map_tensors(self.loss, change)
        return replace(self, rows=rows, loss=loss, block=None)

    def _view(self, block: Tensor) -> Self:
        """Return the micro-batch with the tensors that `pack` has put into a block."""
        start = 0

        def take(tensor: Tensor) -> Tensor:
            nonlocal start
            taken = block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            start += tensor.nbytes + _count_filling(tensor)
            return taken

        return replace(self._map(take), block=block)


def _count_missing(size: int, multiple: int) -> int:
    """Return the number of entries that a size lacks to a positive multiple of `multiple`."""
    return -size % multiple if size else multiple


def _count_filling(tensor: Tensor) -> int:
    """Return the bytes between a tensor's end and the next multiple of 8."""
    return -tensor.nbytes % 8


def _fill_up(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, uint8, filled up to a multiple of 8."""
    return functional.pad(tensor.flatten().view(torch.uint8), (0, _count_filling(tensor)))


def _map_tensors(value: Kind, change: Callable[[Tensor], Tensor]) -> Kind:
    changes: dict[str, Any] = {
        name: change(tensor) for name, tensor in _find_tensors(value).items()
    }
    return replace(value, **changes)


def _find_tensors(value: Rows | LossRows) -> dict[str, Tensor]:
    """Return the tensors among the fields, by name."""
    found = {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
