"""Attention of a layer over the rows of a micro-batch, split into calls of a backend.

Shapes: R rows, E loss rows, Q queries (all rows or the loss rows), H heads, G key/value groups,
D head dimension.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from megatron_eso.batches.rows import STREAMS, Reading, Rows, Span
from megatron_eso.model.attention_backend import AttentionBackend


def attend_rows(
    q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, rows: Rows, backend: AttentionBackend
) -> Tensor:
    """Return the attention of a layer that keeps all rows.

    Args:
        q_RHD: Rotated queries of all rows, padding included.
        k_RGD: Rotated keys. Head h reads group `h // (H / G)`.
        v_RGD: Values.
        rows: The rows.
        backend: The attention backend.

    Returns:
        `[R, H, D]`; zeros at padding.
    """
    return _attend(q_RHD, k_RGD, v_RGD, rows.reads_4R, rows.spans, backend)


def attend_loss_rows(
    q_EHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, rows: Rows, backend: AttentionBackend
) -> Tensor:
    """Return the attention of the last layer, in which only loss rows are queries.

    Args:
        q_EHD: Rotated queries of the loss rows, padding included.
        k_RGD: Rotated keys of all rows.
        v_RGD: Values of all rows.
        rows: The rows.
        backend: The attention backend.

    Returns:
        `[E, H, D]`; zeros at padding.
    """
    reads_4E = rows.reads_4R.index_select(1, rows.loss_rows_E)
    return _attend(q_EHD, k_RGD, v_RGD, reads_4E, rows.loss_spans, backend)


def _attend(
    q_QHD: Tensor,
    k_RGD: Tensor,
    v_RGD: Tensor,
    reads_4Q: Tensor,
    spans: Sequence[Span],
    backend: AttentionBackend,
) -> Tensor:
    """Return `[Q, H, D]`: one call of the backend for each kind of spans."""
    if not spans:
        # The output depends on the inputs, so that parameters get a gradient of zero.
        return torch.zeros_like(q_QHD) + q_QHD[:0].sum() + k_RGD[:0].sum() + v_RGD[:0].sum()
    # Consecutive spans of one kind are a group; the queries are split by group.
    groups = [list(group) for _, group in groupby(spans, key=lambda span: span.reading)]
    sizes = [sum(span.num_rows for span in group) for group in groups]
    sizes.append(q_QHD.shape[0] - sum(sizes))
    queries, reads = torch.split(q_QHD, sizes), torch.split(reads_4Q, sizes, dim=1)
    outputs: dict[int, Tensor] = {}
    # Streams read their own rows, which are consecutive keys.
    numbers = range(len(groups))
    for number in (number for number in numbers if groups[number][0].reading in STREAMS):
        group = groups[number]
        keys = slice(group[0].first_key, group[-1].first_key + group[-1].num_keys)
        outputs[number] = backend.attend_streams(
            queries[number],
            k_RGD[keys],
            v_RGD[keys],
            tuple(span.num_rows for span in group),
            is_causal=group[0].reading is Reading.CAUSAL,
        )
    # All other rows read a part of a stream and some rows more.
    for reading in (Reading.STRICT, Reading.BLOCK):
        chosen = [number for number in numbers if groups[number][0].reading is reading]
        if chosen:
            out_QHD = backend.attend_prefixes(
                _join([queries[number] for number in chosen]),
                k_RGD,
                v_RGD,
                _join([reads[number] for number in chosen], dim=1),
                tuple(span for number in chosen for span in groups[number]),
            )
            parts = torch.split(out_QHD, [sizes[number] for number in chosen])
            outputs.update(zip(chosen, parts, strict=True))
    return torch.cat([*(outputs[number] for number in numbers), torch.zeros_like(queries[-1])])


def _join(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenate tensors; a single one is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
