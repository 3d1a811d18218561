"""Packs parts of samples into the rows of a micro-batch.

An objective describes each sample as parts: runs of rows with tokens, positions, spans and losses.

Shapes: N rows of a part, R rows of the micro-batch, E loss rows, T tokens of a sample.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_eso.batches.rows import LossRows, MicroBatch, Reading, Rows, Span


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Part:
    """Consecutive rows of one sample.

    Attributes:
        sample: Number of the sample in the micro-batch.
        tokens_N: int64, the tokens that the rows hold.
        positions_N: int64, their positions in the text.
        spans: What the rows read. Keys are numbered from the first row of `stream`, own rows from
            the first row of this part.
        stream: The part whose rows are the keys; None: this part.
        is_loss_N: Which rows carry loss; None: no row.
        targets_N: int64, the tokens to predict; ignored at rows without loss.
        weight: Weight of each row in the objective, one number or `[N]`.
        elbo_weight: Weight of each row in the NELBO, one number or `[N]`.
        is_dense: Whether each row carries loss in every plan of the objective. The last layer then
            has the spans of the others, which are faster.
    """

    sample: int
    tokens_N: NDArray[np.int64]
    positions_N: NDArray[np.int64]
    spans: tuple[Span, ...]
    stream: "Part | None" = None
    is_loss_N: NDArray[np.bool_] | None = None
    targets_N: NDArray[np.int64] | None = None
    weight: float | NDArray[np.float64] = 1.0
    elbo_weight: float | NDArray[np.float64] = 1.0
    is_dense: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stream:
    """Tokens of a sample that read each other: all of them, or those of one document.

    Attributes:
        sample: Number of the sample in the micro-batch.
        tokens_N: int64, clean tokens in slot order.
        positions_N: int64, their positions in the text.
        is_masked_N: Which of them are masked.
    """

    sample: int
    tokens_N: NDArray[np.int64]
    positions_N: NDArray[np.int64]
    is_masked_N: NDArray[np.bool_]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.tokens_N)

    @property
    def num_masked(self) -> int:
        """Number of masked tokens."""
        return int(self.is_masked_N.sum())


def split_streams(
    tokens_BT: NDArray[np.int64],
    length_B: NDArray[np.int64],
    permutation_BT: NDArray[np.int64],
    is_masked_BT: NDArray[np.bool_],
    documents_BT: NDArray[np.int64] | None = None,
) -> Iterator[Stream]:
    """Yield the streams of a micro-batch that have masked tokens, sample by sample.

    Args:
        tokens_BT: int64, clean tokens in natural order; any value beyond a sample's length.
        length_B: Real tokens of the samples.
        permutation_BT: `permutation[b, slot] = position`; slots beyond the length come last.
        is_masked_BT: Masked tokens in natural order.
        documents_BT: Number of each token's document, ascending; None: one stream per sample.

    Raises:
        ValueError: The shapes of tokens and permutation differ.
    """
    if tokens_BT.shape != permutation_BT.shape:
        raise ValueError(f"x_0 has shape {tokens_BT.shape}, its noise {permutation_BT.shape}")
    for sample, length in enumerate(length_B.tolist()):
        order = permutation_BT[sample, :length]
        orders = [order]
        if documents_BT is not None:
            document_of = documents_BT[sample, order]
            orders = [order[document_of == number] for number in np.unique(document_of)]
        for positions_N in orders:
            is_masked_N = is_masked_BT[sample, positions_N]
            if is_masked_N.any():
                yield Stream(
                    sample=sample,
                    tokens_N=tokens_BT[sample, positions_N],
                    positions_N=positions_N,
                    is_masked_N=is_masked_N,
                )


def pack_parts(
    parts: Sequence[Part],
    *,
    indices_B: NDArray[np.int64],
    phase_B: NDArray[np.int64],
    mask_token_id: int,
) -> MicroBatch:
    """Pack parts in their order, and number the rows.

    Args:
        parts: The parts; a part comes after its stream. Losses of one sample are at most two runs.
        indices_B: Indices of the samples.
        phase_B: Phases of the samples.
        mask_token_id: The mask token, which padding holds.

    Returns:
        The micro-batch on the CPU, with at least one row and one loss row, which may be padding.
    """
    # Number the rows, and find what they read.
    parts = [part for part in parts if len(part.tokens_N)]
    spans: list[Span] = []
    loss_spans: list[Span] = []
    reads = [np.empty((4, 0), dtype=np.int64)]
    starts: dict[int, int] = {}
    first_row = 0
    for part in parts:
        starts[id(part)] = first_row
        first_key = starts.get(id(part.stream), first_row)
        for span, is_loss_N in _split_losses(part):
            moved = _move(span, first_key, starts[id(part)])
            spans.append(moved)
            found = _find_loss_spans(moved, first_row, is_loss_N)
            loss_spans += [moved] if part.is_dense else found
            reads.append(_count_reads(moved, first_row))
            first_row += span.num_rows
    # Join what the parts hold.
    is_loss = [is_loss_N for part in parts for _, is_loss_N in _split_losses(part)]
    rows = Rows(
        tokens_R=_join([part.tokens_N for part in parts], np.int64),
        positions_R=_join([part.positions_N for part in parts], np.int64),
        reads_4R=torch.from_numpy(np.concatenate(reads, axis=1)),
        loss_rows_E=torch.nonzero(_join(is_loss, np.bool_))[:, 0],
        spans=tuple(spans),
        loss_spans=tuple(loss_spans),
    )
    loss = _pack_losses([part for part in parts if part.is_loss_N is not None], phase_B)
    micro_batch = MicroBatch(rows=rows, loss=loss, indices_B=indices_B, phase_B=phase_B)
    return micro_batch.pad(1, mask_token_id)


def join_batches(
    planned: Sequence[tuple[NDArray[np.int64], MicroBatch]],
    *,
    indices_B: NDArray[np.int64],
    phase_B: NDArray[np.int64],
    mask_token_id: int,
) -> MicroBatch:
    """Join micro-batches that were planned for some samples each.

    Args:
        planned: Numbers of the samples, and their micro-batch without padding between rows.
        indices_B: Indices of all samples.
        phase_B: Phases of all samples.
        mask_token_id: The mask token, which padding holds.
    """
    rows: list[Rows] = []
    losses: list[LossRows] = []
    first_row = 0
    for numbers, batch in planned:
        rows.append(_shift(batch.rows, first_row))
        losses.append(_renumber(batch.loss, numbers, phase_B))
        first_row += batch.rows.num_rows
    joined = Rows(
        **{
            name: torch.cat([getattr(each, name) for each in rows], dim=-1)
            for name in ("tokens_R", "positions_R", "reads_4R", "loss_rows_E")
        },
        spans=tuple(span for each in rows for span in each.spans),
        loss_spans=tuple(span for each in rows for span in each.loss_spans),
    )
    loss = LossRows(
        **{
            name: torch.cat([getattr(each, name) for each in losses])
            for name in ("targets_E", "weights_E", "elbo_weights_E", "phase_E", "sample_E")
        },
        lengths=tuple(length for each in losses for length in each.lengths),
    )
    micro_batch = MicroBatch(rows=joined, loss=loss, indices_B=indices_B, phase_B=phase_B)
    return micro_batch.pad(1, mask_token_id)


def _shift(rows: Rows, first_row: int) -> Rows:
    """Return rows without padding, numbered from `first_row` on."""
    num_rows, num_loss_rows = rows.num_rows, rows.num_loss_rows
    moves_41 = torch.tensor([[first_row], [0], [first_row], [0]])
    return Rows(
        tokens_R=rows.tokens_R[:num_rows],
        positions_R=rows.positions_R[:num_rows],
        reads_4R=rows.reads_4R[:, :num_rows] + moves_41,
        loss_rows_E=rows.loss_rows_E[:num_loss_rows] + first_row,
        spans=tuple(_move(span, first_row, first_row) for span in rows.spans),
        loss_spans=tuple(_move(span, first_row, first_row) for span in rows.loss_spans),
    )


def _renumber(loss: LossRows, numbers: NDArray[np.int64], phase_B: NDArray[np.int64]) -> LossRows:
    """Return loss rows without padding, with the numbers and phases of the whole micro-batch."""
    real = slice(loss.num_real)
    sample_E = torch.from_numpy(numbers)[loss.sample_E[real]]
    return LossRows(
        targets_E=loss.targets_E[real],
        weights_E=loss.weights_E[real],
        elbo_weights_E=loss.elbo_weights_E[real],
        phase_E=torch.from_numpy(phase_B)[sample_E],
        sample_E=sample_E,
        lengths=loss.lengths,
    )


def _split_losses(part: Part) -> Iterator[tuple[Span, NDArray[np.bool_]]]:
    """Yield each span of a part that has rows, and which of them carry loss."""
    is_loss_N = part.is_loss_N
    if is_loss_N is None:
        is_loss_N = np.zeros(len(part.tokens_N), dtype=np.bool_)
    row = 0
    for span in part.spans:
        if span.num_rows:
            yield span, is_loss_N[row : row + span.num_rows]
        row += span.num_rows


def _move(span: Span, first_key: int, first_row: int) -> Span:
    """Return the span of a part with the numbers of the micro-batch."""
    return span._replace(
        first_key=span.first_key + first_key,
        first_own=span.first_own + first_row if span.reading is Reading.BLOCK else 0,
    )


def _count_reads(span: Span, first_row: int) -> NDArray[np.int64]:
    """Return `[4, N]`: what each row of a span reads."""
    rows_N = first_row + np.arange(span.num_rows)
    last = span.num_rows - 1
    own: Any
    match span.reading:
        case Reading.CAUSAL:
            num_keys, own = np.arange(span.num_rows), (rows_N, 1)
        case Reading.FULL:
            num_keys, own = np.zeros_like(rows_N), (span.first_key, span.num_keys)
        case Reading.STRICT:
            num_keys, own = span.num_keys - last + np.arange(span.num_rows), (rows_N, 1)
        case Reading.BLOCK:
            num_keys, own = np.full_like(rows_N, span.num_keys), (span.first_own, span.num_own)
    reads = np.broadcast_arrays(span.first_key, num_keys, *own)
    return np.stack(reads).astype(np.int64)


def _find_loss_spans(span: Span, first_row: int, is_loss_N: NDArray[np.bool_]) -> Iterator[Span]:
    """Yield the spans of the loss rows of a span, each of consecutive rows where reads grow."""
    loss_N = np.flatnonzero(is_loss_N)
    if len(loss_N) == 0:
        return
    match span.reading:
        case Reading.FULL:
            yield Span(Reading.BLOCK, len(loss_N), span.first_key, 0, span.first_key, span.num_keys)
        case Reading.BLOCK:
            yield span._replace(num_rows=len(loss_N))
        case _:
            # The keys of the first row of each run of consecutive loss rows.
            num_keys_N = _count_reads(span, first_row)[1]
            for run in np.split(loss_N, np.flatnonzero(np.diff(loss_N) > 1) + 1):
                yield Span(Reading.STRICT, len(run), span.first_key, int(num_keys_N[run[-1]]))


def _pack_losses(parts: Sequence[Part], phase_B: NDArray[np.int64]) -> LossRows:
    """Pack the targets and weights of the loss rows of parts."""
    targets, weights, elbo_weights, samples = [], [], [], []
    for part in parts:
        is_loss_N = part.is_loss_N
        assert is_loss_N is not None
        assert part.targets_N is not None
        targets.append(part.targets_N[is_loss_N])
        weights.append(np.broadcast_to(part.weight, is_loss_N.shape)[is_loss_N])
        elbo_weights.append(np.broadcast_to(part.elbo_weight, is_loss_N.shape)[is_loss_N])
        samples.append(np.full(len(targets[-1]), part.sample))
    sample_E = np.concatenate([np.empty(0, dtype=np.int64), *samples])
    return LossRows(
        targets_E=_join(targets, np.int64),
        weights_E=_join(weights, np.float32),
        elbo_weights_E=_join(elbo_weights, np.float32),
        phase_E=_join([phase_B[sample_E]], np.int64),
        sample_E=_join([sample_E], np.int64),
        lengths=tuple(len(list(run)) for _, run in groupby(sample_E.tolist())),
    )


def _join(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False))
