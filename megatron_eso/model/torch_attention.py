"""Attention over streams and query spans in plain torch, for any device and dtype.

There is no dense mask. The log-sum-exp merges a strict query's own key and value with those of its
stream.

Shapes: R rows, Q strict queries, N keys, H heads, G key/value groups, D head dimension; r = H / G
heads read one group, S streams of equal length, T the length of these streams, t queries of a tile,
n keys that a tile reads.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron_eso.model.spans import QuerySpan

TILE_QUERIES = 256


class TorchAttention:
    """The torch backend: SDPA for causal streams, tiles of float32 scores for strict queries."""

    def attend_causally(
        self, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, lengths: tuple[int, ...]
    ) -> Tensor:
        """Attend within each stream; consecutive streams of equal length share one call."""
        runs = [(length, len(list(run))) for length, run in groupby(lengths) if length]
        if not runs:
            return torch.zeros_like(q_RHD)
        sizes = [length * count for length, count in runs]
        outputs = []
        for (length, _), *parts in zip(
            runs, *(torch.split(x, sizes) for x in (q_RHD, k_RGD, v_RGD)), strict=True
        ):
            q_SHTD, k_SGTD, v_SGTD = (
                part.reshape(-1, length, *part.shape[1:]).transpose(1, 2) for part in parts
            )
            out_SHTD = functional.scaled_dot_product_attention(
                q_SHTD,
                k_SGTD,
                v_SGTD,
                is_causal=True,
                enable_gqa=q_SHTD.shape[1] != k_SGTD.shape[1],
            )
            outputs.append(out_SHTD.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)

    def attend_strictly(
        self,
        q_QHD: Tensor,
        k_NGD: Tensor,
        v_NGD: Tensor,
        own_k_QGD: Tensor,
        own_v_QGD: Tensor,
        spans: tuple[QuerySpan, ...],
    ) -> Tensor:
        """Attend tile by tile, with its own backward pass."""
        inputs = (q_QHD, k_NGD, v_NGD, own_k_QGD, own_v_QGD)
        out_QHD: Tensor = StrictQueryAttention.apply(*inputs, spans)  # type: ignore[no-untyped-call]
        return out_QHD


class _Tile(NamedTuple):
    queries: slice
    keys: slice


class StrictQueryAttention(torch.autograd.Function):
    """Attention of strict queries with the self term merged, and its backward pass.

    Autograd through the merge would need the gradient of the log-sum-exp, which fused kernels do
    not give. The backward pass here uses the merged output and log-sum-exp. The probabilities
    `exp(score - lse)` of the stream's keys and of the own key are then those of one softmax.
    Scores, sums and probabilities are float32 for low-precision inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_QHD: Tensor,
        k_NGD: Tensor,
        v_NGD: Tensor,
        own_k_QGD: Tensor,
        own_v_QGD: Tensor,
        spans: tuple[QuerySpan, ...],
    ) -> Tensor:
        """Return the attention `[Q, H, D]` in the dtype of q."""
        q, k, v, own_k, own_v = (_upcast(x) for x in (q_QHD, k_NGD, v_NGD, own_k_QGD, own_v_QGD))
        q_QGrD = _group_heads(q, k.shape[1]) * q.shape[-1] ** -0.5
        # Start with the self term, then add each tile's keys to the softmax.
        own_scores_QGr = torch.einsum("qgrd,qgd->qgr", q_QGrD, own_k)
        lse_QGr = own_scores_QGr.clone()
        out_QGrD = torch.zeros_like(q_QGrD)
        for tile in _tiles(spans):
            scores_Grtn = _score(q_QGrD[tile.queries], k[tile.keys])
            lse_tGr = torch.logaddexp(
                scores_Grtn.logsumexp(-1).permute(2, 0, 1), own_scores_QGr[tile.queries]
            )
            probabilities = (scores_Grtn - lse_tGr.permute(1, 2, 0)[..., None]).exp_()
            out_QGrD[tile.queries] = torch.einsum("grtn,ngd->tgrd", probabilities, v[tile.keys])
            lse_QGr[tile.queries] = lse_tGr
        # The self term's probability needs the final log-sum-exp.
        own_probabilities_QGr = (own_scores_QGr - lse_QGr).exp_()
        out_QGrD += own_probabilities_QGr[..., None] * own_v[:, :, None]
        out_QHD = out_QGrD.flatten(1, 2).to(q_QHD.dtype)
        ctx.save_for_backward(q_QHD, k_NGD, v_NGD, own_k_QGD, own_v_QGD, out_QHD, lse_QGr)
        ctx.spans = spans
        return out_QHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_QHD: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the five tensors; recompute the probabilities."""
        q_QHD, k_NGD, v_NGD, own_k_QGD, own_v_QGD, out_QHD, lse_QGr = ctx.saved_tensors
        q, k, v, own_k, own_v, d_out = (
            _upcast(x) for x in (q_QHD, k_NGD, v_NGD, own_k_QGD, own_v_QGD, d_out_QHD)
        )
        groups, scale = k.shape[1], q.shape[-1] ** -0.5
        q_QGrD, d_out_QGrD = _group_heads(q, groups) * scale, _group_heads(d_out, groups)
        delta_QGr = (d_out_QGrD * _group_heads(_upcast(out_QHD), groups)).sum(-1)

        # The self term.
        own_probabilities_QGr = (torch.einsum("qgrd,qgd->qgr", q_QGrD, own_k) - lse_QGr).exp_()
        d_own_scores_QGr = own_probabilities_QGr * (
            torch.einsum("qgrd,qgd->qgr", d_out_QGrD, own_v) - delta_QGr
        )
        d_own_v = torch.einsum("qgr,qgrd->qgd", own_probabilities_QGr, d_out_QGrD)
        d_own_k = torch.einsum("qgr,qgrd->qgd", d_own_scores_QGr, q_QGrD)
        d_q_QGrD = d_own_scores_QGr[..., None] * own_k[:, :, None]

        # The keys of the stream, tile by tile.
        d_k, d_v = torch.zeros_like(k), torch.zeros_like(v)
        for tile in _tiles(ctx.spans):
            scores_Grtn = _score(q_QGrD[tile.queries], k[tile.keys])
            probabilities = (scores_Grtn - lse_QGr[tile.queries].permute(1, 2, 0)[..., None]).exp_()
            d_out_tGrD = d_out_QGrD[tile.queries]
            d_v[tile.keys] += torch.einsum("grtn,tgrd->ngd", probabilities, d_out_tGrD)
            d_scores_Grtn = torch.einsum("tgrd,ngd->grtn", d_out_tGrD, v[tile.keys])
            d_scores_Grtn -= delta_QGr[tile.queries].permute(1, 2, 0)[..., None]
            d_scores_Grtn *= probabilities
            d_k[tile.keys] += torch.einsum("grtn,tgrd->ngd", d_scores_Grtn, q_QGrD[tile.queries])
            d_q_QGrD[tile.queries] += torch.einsum("grtn,ngd->tgrd", d_scores_Grtn, k[tile.keys])
        d_q = (d_q_QGrD * scale).flatten(1, 2)
        gradients = (d_q, d_k, d_v, d_own_k, d_own_v)
        return *(gradient.to(d_out_QHD.dtype) for gradient in gradients), None


def _tiles(spans: tuple[QuerySpan, ...]) -> Iterator[_Tile]:
    """Yield the tiles that have keys: queries, and the keys that the last query reads."""
    first_query = 0
    for span in spans:
        for start in range(0, span.num_queries, TILE_QUERIES):
            end = min(start + TILE_QUERIES, span.num_queries)
            num_keys = span.num_keys - span.num_queries + end
            if num_keys:
                yield _Tile(
                    slice(first_query + start, first_query + end),
                    slice(span.first_key, span.first_key + num_keys),
                )
        first_query += span.num_queries


def _score(q_tGrD: Tensor, k_nGD: Tensor) -> Tensor:
    """Return a tile's scores `[G, r, t, n]`, -inf where a key is not before the query."""
    scores_Grtn = torch.einsum("tgrd,ngd->grtn", q_tGrD, k_nGD)
    # The tile's last query reads all n keys; each query before it reads one key less.
    num_queries = q_tGrD.shape[0]
    if num_queries > 1:
        hidden = torch.ones(
            num_queries, num_queries - 1, dtype=torch.bool, device=q_tGrD.device
        ).triu_()
        scores_Grtn[..., 1 - num_queries :].masked_fill_(hidden, -torch.inf)
    return scores_Grtn


def _group_heads(x_QHD: Tensor, num_groups: int) -> Tensor:
    return x_QHD.view(x_QHD.shape[0], num_groups, -1, x_QHD.shape[2])


def _upcast(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
