"""The parts of a sample by what its rows read: streams, clean streams with queries, noisy blocks.

Shapes: N tokens of a stream.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from megatron_eso.batches.packing import Part, Stream
from megatron_eso.batches.rows import Reading, Span

Weight = float | NDArray[np.float64]


def read_causally(length: int) -> tuple[Span, ...]:
    """Return the spans of a causal stream."""
    return (Span(Reading.CAUSAL, length, 0, length),)


def read_fully(length: int) -> tuple[Span, ...]:
    """Return the spans of a stream whose rows read each other."""
    return (Span(Reading.FULL, length, 0, length),)


def read_prefix_fully(num_clean: int, length: int) -> tuple[Span, ...]:
    """Return the spans of a stream whose first rows read each other; the others are causal."""
    if num_clean < 2:
        return read_causally(length)
    return (*read_fully(num_clean), Span(Reading.STRICT, length - num_clean, 0, length - 1))


def plan_mixed(
    stream: Stream,
    spans: tuple[Span, ...],
    mask_token_id: int,
    *,
    weight: Weight = 1.0,
    elbo_weight: Weight = 1.0,
) -> Part:
    """Plan a mixed stream: one row for each token; masked ones hold the mask token and carry loss.

    Args:
        stream: The tokens of the stream.
        spans: What its rows read.
        mask_token_id: The mask token.
        weight: Weight of the masked tokens in the objective, or of each token.
        elbo_weight: Weight of the masked tokens in the NELBO, or of each token.
    """
    return Part(
        sample=stream.sample,
        tokens_N=np.where(stream.is_masked_N, mask_token_id, stream.tokens_N),
        positions_N=stream.positions_N,
        spans=spans,
        is_loss_N=stream.is_masked_N,
        targets_N=stream.tokens_N,
        weight=weight,
        elbo_weight=elbo_weight,
    )


def plan_clean(stream: Stream, spans: tuple[Span, ...]) -> Part:
    """Plan a clean stream of N - 1 rows: no row reads the clean token of the last slot."""
    return Part(
        sample=stream.sample,
        tokens_N=stream.tokens_N[:-1],
        positions_N=stream.positions_N[:-1],
        spans=spans,
    )


def plan_queries(stream: Stream, clean: Part, mask_token_id: int) -> Part:
    """Plan a query for each masked slot, which reads the clean stream before its slot.

    Args:
        stream: The tokens of the stream; the masked ones have the last slots.
        clean: Its clean stream.
        mask_token_id: The mask token.
    """
    num_masked = stream.num_masked
    return Part(
        sample=stream.sample,
        tokens_N=np.full(num_masked, mask_token_id),
        positions_N=stream.positions_N[-num_masked:],
        spans=(Span(Reading.STRICT, num_masked, 0, stream.length - 1),),
        stream=clean,
        is_loss_N=np.ones(num_masked, dtype=np.bool_),
        targets_N=stream.tokens_N[-num_masked:],
    )


def plan_next_tokens(stream: Stream, mask_token_id: int) -> tuple[Part, Part]:
    """Plan a clean stream whose rows predict the next token, and queries for the other targets.

    The row of the slot before predicts a masked token if it has the token before it in the text.
    That row has read all earlier slots and itself, which is what a query would read. A query
    predicts each other masked token: the first one of every run.

    Args:
        stream: The tokens of the stream; the masked ones have the last slots.
        mask_token_id: The mask token.

    Returns:
        The clean stream of N - 1 rows, and the queries, which read it before their slots.
    """
    positions_N, num_clean = stream.positions_N, stream.length - stream.num_masked
    is_next_N = np.diff(positions_N, prepend=-2) == 1
    is_next_N[:num_clean] = False
    clean = replace(
        plan_clean(stream, read_causally(stream.length - 1)),
        is_loss_N=is_next_N[1:],
        targets_N=stream.tokens_N[1:],
    )
    # The queries, one span for those of consecutive slots.
    slots = num_clean + np.flatnonzero(~is_next_N[num_clean:])
    runs = np.split(slots, np.flatnonzero(np.diff(slots) > 1) + 1)
    return clean, Part(
        sample=stream.sample,
        tokens_N=np.full(len(slots), mask_token_id),
        positions_N=positions_N[slots],
        spans=tuple(Span(Reading.STRICT, len(run), 0, int(run[-1])) for run in runs if len(run)),
        stream=clean,
        is_loss_N=np.ones(len(slots), dtype=np.bool_),
        targets_N=stream.tokens_N[slots],
    )


def plan_shifted(stream: Stream, first_token: int | None, elbo_weight: float = 1.0) -> Part:
    """Plan a causal stream in natural order, each of whose rows predicts the next token.

    A row has the position of its target, so a stream reads the same relative positions with or
    without a first token.

    Args:
        stream: The tokens of the stream.
        first_token: The token that predicts the first one; None: no row predicts it.
        elbo_weight: Weight of the tokens in the NELBO.
    """
    num_targets = stream.length if first_token is not None else stream.length - 1
    tokens_N = np.concatenate([[] if first_token is None else [first_token], stream.tokens_N[:-1]])
    return Part(
        sample=stream.sample,
        tokens_N=tokens_N.astype(np.int64),
        positions_N=stream.positions_N[-num_targets:] if num_targets else stream.positions_N[:0],
        spans=read_causally(num_targets),
        is_loss_N=np.ones(num_targets, dtype=np.bool_),
        targets_N=stream.tokens_N[stream.length - num_targets :],
        elbo_weight=elbo_weight,
        is_dense=True,
    )


def plan_blocks(
    stream: Stream,
    block_of_N: NDArray[np.int64],
    mask_token_id: int,
    *,
    weight_N: NDArray[np.float64],
    elbo_weight_N: NDArray[np.float64],
) -> tuple[Part, Part]:
    """Plan a clean stream, and the noisy blocks that hold a masked token.

    A clean row reads its block and the blocks before it. A row of a noisy block reads the clean
    blocks before it and its whole noisy block, whose clean tokens have rows of their own there.

    Args:
        stream: The tokens of the stream in natural order.
        block_of_N: Number of each token's block, ascending.
        mask_token_id: The mask token.
        weight_N: Weight of each token in the objective, if it is masked.
        elbo_weight_N: Weight of each token in the NELBO, if it is masked.

    Returns:
        The clean stream, as far as a noisy block reads it, and the noisy blocks.
    """
    starts = np.flatnonzero(np.diff(block_of_N, prepend=-1))
    ends = np.append(starts[1:], stream.length)
    is_noisy = np.logical_or.reduceat(stream.is_masked_N, starts)
    noisy = [slice(*bounds) for bounds in zip(starts[is_noisy], ends[is_noisy], strict=True)]
    # The clean stream: every block before the last noisy one.
    num_clean = int(noisy[-1].start)
    before = starts < num_clean
    clean = Part(
        sample=stream.sample,
        tokens_N=stream.tokens_N[:num_clean],
        positions_N=stream.positions_N[:num_clean],
        spans=tuple(
            Span(Reading.BLOCK, end - start, 0, start, start, end - start)
            for start, end in zip(starts[before].tolist(), ends[before].tolist(), strict=True)
        ),
    )
    # The noisy blocks, one after another.
    spans, row = [], 0
    for block in noisy:
        length = int(block.stop - block.start)
        spans.append(Span(Reading.BLOCK, length, 0, int(block.start), row, length))
        row += length
    rows = np.concatenate([np.arange(block.start, block.stop) for block in noisy])
    is_masked_N = stream.is_masked_N[rows]
    return clean, Part(
        sample=stream.sample,
        tokens_N=np.where(is_masked_N, mask_token_id, stream.tokens_N[rows]),
        positions_N=stream.positions_N[rows],
        spans=tuple(spans),
        stream=clean,
        is_loss_N=is_masked_N,
        targets_N=stream.tokens_N[rows],
        weight=weight_N[rows],
        elbo_weight=elbo_weight_N[rows],
    )
