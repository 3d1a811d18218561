"""A micro-batch as a list of (token, position) rows instead of a dense mask.

A sample has n real tokens: T, or fewer if it was cut. Rows are packed in slot order as
- mixed streams (the diffusion phase), n rows each: clean tokens, then mask tokens;
- clean streams (the sequential phase), n - 1 rows each: no row reads the clean token of the last
  slot;
- mask queries of the clean streams, one for each masked token;
- padding.

In every layer except the last, streams attend causally. Each query reads the clean stream of its
sample strictly before its slot, and itself. This is the 2T x 2T mask of the reference
(models/dit.py, BD3-LM mask of block size 1) without the rows that no loss needs. In the last layer,
every loss row is such a query over the first n - 1 rows of its stream.

Shapes: B samples, T positions or slots, R rows, E loss rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from megatron_eso.objectives.noise import Noise


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """The rows that a network reads: their streams, queries and loss rows.

    Tensors are on one device; lengths are Python integers. A sample without a masked token carries
    no loss and has no rows.

    Attributes:
        tokens_R: int64, token of each row: the mask token for masked slots, queries and padding.
        positions_R: int64, position of each token in the text; 0 for padding.
        stream_lengths: N of each mixed stream, then n - 1 of each clean stream.
        num_mixed_streams: Number of mixed streams, which come first.
        query_lengths: Mask queries of each clean stream.
        loss_rows_E: int64, number of each loss row among the rows: mask tokens of mixed streams,
            then queries, then padding (0).
        loss_lengths: Loss rows of each stream.
        num_rows: Rows without padding.
        num_loss_rows: Loss rows without padding.
    """

    tokens_R: Tensor
    positions_R: Tensor
    stream_lengths: tuple[int, ...]
    num_mixed_streams: int
    query_lengths: tuple[int, ...]
    loss_rows_E: Tensor
    loss_lengths: tuple[int, ...]
    num_rows: int
    num_loss_rows: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LossRows:
    """The targets of the loss rows of a micro-batch, and their weights.

    Attributes:
        targets_E: int64, the token to predict; 0 for padding.
        weights_E: float32, weight in the objective; 0 for padding.
        elbo_weights_E: float32, weight in the NELBO; 0 for padding.
        phase_E: int64, number of the phase; 0 for padding.
        sample_E: int64, number of each loss row's sample in the micro-batch; 0 for padding.
        lengths: Loss rows of each sample that has any, in the order of the rows.
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
            taken = block[start : start + tensor.nbytes].view(tensor.dtype)
            start += tensor.nbytes + _count_filling(tensor)
            return taken

        return replace(self._map(take), block=block)


def plan_rows(
    x_0_BT: NDArray[np.int64],
    noise: Noise,
    *,
    indices_B: NDArray[np.int64],
    phase_B: NDArray[np.int64],
    weight_B: NDArray[np.float64],
    elbo_weight_B: NDArray[np.float64],
    mask_token_id: int,
) -> MicroBatch:
    """Plan the rows of a micro-batch.

    Args:
        x_0_BT: int64, clean tokens in natural order; any value beyond a sample's length.
        noise: Lengths, masks and slot orders of the samples. Samples of `noise.is_sequential_B`
            become clean streams with queries, the others mixed streams.
        indices_B: Indices of the samples.
        phase_B: Phases of the samples.
        weight_B: Weight of each sample's masked tokens in the objective.
        elbo_weight_B: Weight of each sample's masked tokens in the NELBO.
        mask_token_id: The mask token.

    Returns:
        The micro-batch on the CPU, with at least one row and one loss row, which may be padding.

    Raises:
        ValueError: The shapes of tokens and noise differ.
    """
    if x_0_BT.shape != noise.permutation_BT.shape:
        raise ValueError(f"x_0 has shape {x_0_BT.shape}, its noise {noise.permutation_BT.shape}")
    # Sort the samples into mixed and clean streams, and their tokens into slots.
    slots = _Slots.sort(x_0_BT, noise)
    sample_E = np.repeat(np.concatenate([slots.mixed, slots.clean]), slots.counts)
    # Targets and weights of the loss rows: mask tokens of mixed streams, then queries.
    loss = LossRows(
        targets_E=_join(
            [
                slots.tokens_BT[slots.mixed][slots.is_loss],
                slots.tokens_BT[slots.clean][slots.is_query],
            ],
            np.int64,
        ),
        weights_E=_join([weight_B[sample_E]], np.float32),
        elbo_weights_E=_join([elbo_weight_B[sample_E]], np.float32),
        phase_E=_join([phase_B[sample_E]], np.int64),
        sample_E=_join([sample_E], np.int64),
        lengths=tuple(slots.counts.tolist()),
    )
    rows = _pack(slots, mask_token_id)
    micro_batch = MicroBatch(rows=rows, loss=loss, indices_B=indices_B, phase_B=phase_B)
    return micro_batch.pad(1, mask_token_id)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Slots:
    """The samples of a micro-batch in slot order, with the slots that become rows.

    Attributes:
        tokens_BT: Clean tokens in slot order.
        permutation_BT: Positions of the slots.
        length_B: Real tokens of the samples.
        mixed: Samples that become mixed streams; they have masked tokens.
        clean: Samples that become clean streams with queries; they have masked tokens.
        counts: Masked tokens of the mixed samples, then of the clean ones.
        is_loss: Slots of the mixed samples that hold a mask token.
        is_query: Slots of the clean samples that a query predicts.
        in_mixed: Slots of the mixed samples that are rows.
        in_clean: Slots of the clean samples that are rows: all but the last.
    """

    tokens_BT: NDArray[np.int64]
    permutation_BT: NDArray[np.int64]
    length_B: NDArray[np.int64]
    mixed: NDArray[np.int64]
    clean: NDArray[np.int64]
    counts: NDArray[np.int64]
    is_loss: NDArray[np.bool_]
    is_query: NDArray[np.bool_]
    in_mixed: NDArray[np.bool_]
    in_clean: NDArray[np.bool_]

    @classmethod
    def sort(cls, x_0_BT: NDArray[np.int64], noise: Noise) -> Self:
        """Sort samples by slot: clean tokens come first, masked tokens have the last slots."""
        num_masked_B = noise.is_masked_BT.sum(axis=1)
        mixed = np.flatnonzero(~noise.is_sequential_B & (num_masked_B > 0))
        clean = np.flatnonzero(noise.is_sequential_B & (num_masked_B > 0))
        slot_T = np.arange(x_0_BT.shape[1])
        is_real_BT = slot_T < noise.length_B[:, None]
        is_masked_BT = is_real_BT & (slot_T >= (noise.length_B - num_masked_B)[:, None])
        return cls(
            tokens_BT=np.take_along_axis(x_0_BT, noise.permutation_BT, axis=1),
            permutation_BT=noise.permutation_BT,
            length_B=noise.length_B,
            mixed=mixed,
            clean=clean,
            counts=num_masked_B[np.concatenate([mixed, clean])],
            is_loss=is_masked_BT[mixed],
            is_query=is_masked_BT[clean],
            in_mixed=is_real_BT[mixed],
            in_clean=slot_T < noise.length_B[clean, None] - 1,
        )


def _pack(slots: _Slots, mask_token_id: int) -> Rows:
    """Pack the rows: mixed streams, clean streams, queries."""
    # Tokens and positions, in the order of the rows.
    mixed, clean = slots.mixed, slots.clean
    queries = slots.permutation_BT[clean][slots.is_query]
    tokens_R = [
        np.where(slots.is_loss, mask_token_id, slots.tokens_BT[mixed])[slots.in_mixed],
        slots.tokens_BT[clean][slots.in_clean],
        np.full(len(queries), mask_token_id),
    ]
    positions_R = [
        slots.permutation_BT[mixed][slots.in_mixed],
        slots.permutation_BT[clean][slots.in_clean],
        queries,
    ]
    # Mixed streams carry loss at their mask tokens, clean streams at their queries, the last rows.
    num_rows = sum(len(part) for part in tokens_R)
    loss_rows_E = [
        np.flatnonzero(slots.is_loss[slots.in_mixed]),
        np.arange(num_rows - len(queries), num_rows),
    ]
    lengths = (*slots.length_B[mixed].tolist(), *(slots.length_B[clean] - 1).tolist())
    return Rows(
        tokens_R=_join(tokens_R, np.int64),
        positions_R=_join(positions_R, np.int64),
        stream_lengths=lengths,
        num_mixed_streams=len(mixed),
        query_lengths=tuple(slots.counts[len(mixed) :].tolist()),
        loss_rows_E=_join(loss_rows_E, np.int64),
        loss_lengths=tuple(slots.counts.tolist()),
        num_rows=num_rows,
        num_loss_rows=int(slots.counts.sum()),
    )


def _join(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(dtype, copy=False))


def _count_missing(size: int, multiple: int) -> int:
    """Return the number of entries that a size lacks to a positive multiple of `multiple`."""
    return -size % multiple if size else multiple


def _count_filling(tensor: Tensor) -> int:
    """Return the bytes between a tensor's end and the next multiple of 8."""
    return -tensor.nbytes % 8


def _fill_up(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, uint8, filled up to a multiple of 8."""
    return functional.pad(tensor.view(torch.uint8), (0, _count_filling(tensor)))


def _map_tensors(value: Kind, change: Callable[[Tensor], Tensor]) -> Kind:
    changes: dict[str, Any] = {
        name: change(tensor) for name, tensor in _find_tensors(value).items()
    }
    return replace(value, **changes)


def _find_tensors(value: Rows | LossRows) -> dict[str, Tensor]:
    """Return the tensors among the fields, by name."""
    found = {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
