"""Attention of a layer over the rows of a micro-batch, split into calls of a backend.

Shapes: R rows, E loss rows, H heads, G key/value groups, D head dimension.
"""

import torch
from torch import Tensor

from megatron_eso.model.attention_backend import AttentionBackend
from megatron_eso.model.spans import find_body_spans, find_loss_spans
from megatron_eso.objectives.rows import Rows


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
    if rows.num_rows == 0:
        return _attend_nothing(q_RHD, k_RGD, v_RGD)
    # Split the rows: mixed streams, clean streams, queries, padding.
    spans = find_body_spans(rows)
    sizes = [*spans.sizes, q_RHD.shape[0] - sum(spans.sizes)]
    q_parts, k_parts, v_parts = (torch.split(tensor, sizes) for tensor in (q_RHD, k_RGD, v_RGD))
    # Streams attend causally; queries read the clean streams; padding stays zero.
    lengths = (spans.mixed_lengths, spans.clean_lengths)
    outputs = [
        backend.attend_causally(q_parts[i], k_parts[i], v_parts[i], lengths[i]) for i in (0, 1)
    ]
    if spans.sizes[2]:
        outputs.append(
            backend.attend_strictly(
                q_parts[2], k_parts[1], v_parts[1], k_parts[2], v_parts[2], spans.queries
            )
        )
    outputs.append(torch.zeros_like(q_parts[3]))
    return torch.cat(outputs)


def attend_loss_rows(
    q_EHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, rows: Rows, backend: AttentionBackend
) -> Tensor:
    """Return the attention of the last layer, in which only loss rows are queries.

    Args:
        q_EHD: Rotated queries of the loss rows, padding included.
        k_RGD: Rotated keys of all rows; the own key of a loss row is `k_RGD[loss_rows_E]`.
        v_RGD: Values of all rows.
        rows: The rows.
        backend: The attention backend.

    Returns:
        `[E, H, D]`; zeros at padding.
    """
    num_queries = rows.num_loss_rows
    if num_queries == 0:
        return _attend_nothing(q_EHD, k_RGD, v_RGD)
    # Each loss row is a strict query with its own key and value, besides those of its stream.
    q_QHD, q_padding = torch.split(q_EHD, [num_queries, q_EHD.shape[0] - num_queries])
    own_rows = rows.loss_rows_E[:num_queries]
    out_QHD = backend.attend_strictly(
        q_QHD,
        k_RGD,
        v_RGD,
        k_RGD.index_select(0, own_rows),
        v_RGD.index_select(0, own_rows),
        find_loss_spans(rows),
    )
    return torch.cat([out_QHD, torch.zeros_like(q_padding)])


def _attend_nothing(q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor) -> Tensor:
    """Return zeros that depend on the inputs, so that parameters get a gradient of zero."""
    return torch.zeros_like(q_RHD) + q_RHD[:0].sum() + k_RGD[:0].sum() + v_RGD[:0].sum()
