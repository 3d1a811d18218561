"""Attention over spans of rows in plain torch, for any device and dtype.

There is no dense mask over a micro-batch. Queries are processed in tiles, each with one softmax
over the keys of its stream and over the rows of its own.

Shapes: R rows, Q queries, H heads, G key/value groups, D head dimension; r = H / G heads read one
group, S streams of equal length, T the length of these streams, t queries of a tile, n rows that a
tile reads.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron_eso.batches.rows import Reading, Span

TILE_QUERIES = 256


class TorchAttention:
    """The torch backend: SDPA within streams, tiles of float32 scores for all other spans."""

    def attend_streams(
        self,
        q_QHD: Tensor,
        k_QGD: Tensor,
        v_QGD: Tensor,
        lengths: tuple[int, ...],
        *,
        is_causal: bool,
    ) -> Tensor:
        """Attend within each stream; consecutive streams of equal length share one call."""
        runs = [(length, len(list(run))) for length, run in groupby(lengths)]
        sizes = [length * count for length, count in runs]
        outputs = []
        for (length, _), *parts in zip(
            runs, *(torch.split(x, sizes) for x in (q_QHD, k_QGD, v_QGD)), strict=True
        ):
            q_SHTD, k_SGTD, v_SGTD = (
                part.reshape(-1, length, *part.shape[1:]).transpose(1, 2) for part in parts
            )
            out_SHTD = functional.scaled_dot_product_attention(
                q_SHTD,
                k_SGTD,
                v_SGTD,
                is_causal=is_causal,
                enable_gqa=q_SHTD.shape[1] != k_SGTD.shape[1],
            )
            outputs.append(out_SHTD.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)

    def attend_prefixes(
        self,
        q_QHD: Tensor,
        k_RGD: Tensor,
        v_RGD: Tensor,
        reads_4Q: Tensor,
        spans: tuple[Span, ...],
    ) -> Tensor:
        """Attend tile by tile, with its own backward pass."""
        out_QHD: Tensor = PrefixAttention.apply(q_QHD, k_RGD, v_RGD, reads_4Q, spans)  # type: ignore[no-untyped-call]
        return out_QHD


class _Tile(NamedTuple):
    """Queries of one stream.

    Attributes:
        queries: Their numbers.
        keys: The keys that any of them reads.
        num_common: Keys that all of them read.
        own: The rows of their blocks; empty if each reads itself.
        is_merged: Whether they belong to several blocks.
    """

    queries: slice
    keys: slice
    num_common: int
    own: slice
    is_merged: bool


class PrefixAttention(torch.autograd.Function):
    """Attention of queries that read a part of a stream and own rows, and its backward pass.

    A query that reads itself gets its own key by a merge of log-sum-exps. Autograd through the
    merge would need the gradient of the log-sum-exp, which fused kernels do not give. The backward
    pass here uses the merged output and log-sum-exp. The probabilities `exp(score - lse)` of all
    rows that a query reads are then those of one softmax. Scores, sums and probabilities are
    float32 for low-precision inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_QHD: Tensor,
        k_RGD: Tensor,
        v_RGD: Tensor,
        reads_4Q: Tensor,
        spans: tuple[Span, ...],
    ) -> Tensor:
        """Return the attention `[Q, H, D]` in the dtype of q."""
        q, k, v = (_upcast(x) for x in (q_QHD, k_RGD, v_RGD))
        q_QGrD = _group_heads(q, k.shape[1]) * q.shape[-1] ** -0.5
        out_QGrD = torch.zeros_like(q_QGrD)
        # Start with the query itself, where it reads itself.
        is_strict = spans[0].reading is Reading.STRICT
        if is_strict:
            own_k_QGD, own_v_QGD = k.index_select(0, reads_4Q[2]), v.index_select(0, reads_4Q[2])
            own_scores_QGr = torch.einsum("qgrd,qgd->qgr", q_QGrD, own_k_QGD)
            lse_QGr = own_scores_QGr.clone()
        else:
            lse_QGr = torch.empty_like(q_QGrD[..., 0])
        # Add the rows of each tile to the softmax.
        for tile in _tiles(spans):
            scores_Grtn = _score(q_QGrD[tile.queries], _take(k, tile), tile, reads_4Q)
            lse_tGr = scores_Grtn.logsumexp(-1).permute(2, 0, 1)
            if is_strict:
                lse_tGr = torch.logaddexp(lse_tGr, own_scores_QGr[tile.queries])
            probabilities = (scores_Grtn - lse_tGr.permute(1, 2, 0)[..., None]).exp_()
            out_QGrD[tile.queries] = torch.einsum("grtn,ngd->tgrd", probabilities, _take(v, tile))
            lse_QGr[tile.queries] = lse_tGr
        # The query's own probability needs the final log-sum-exp.
        if is_strict:
            own_probabilities_QGr = (own_scores_QGr - lse_QGr).exp_()
            out_QGrD += own_probabilities_QGr[..., None] * own_v_QGD[:, :, None]
        out_QHD = out_QGrD.flatten(1, 2).to(q_QHD.dtype)
        ctx.save_for_backward(q_QHD, k_RGD, v_RGD, reads_4Q, out_QHD, lse_QGr)
        ctx.spans = spans
        return out_QHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_QHD: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k and v; recompute the probabilities."""
        q_QHD, k_RGD, v_RGD, reads_4Q, out_QHD, lse_QGr = ctx.saved_tensors
        q, k, v, d_out = (_upcast(x) for x in (q_QHD, k_RGD, v_RGD, d_out_QHD))
        groups, scale = k.shape[1], q.shape[-1] ** -0.5
        q_QGrD, d_out_QGrD = _group_heads(q, groups) * scale, _group_heads(d_out, groups)
        delta_QGr = (d_out_QGrD * _group_heads(_upcast(out_QHD), groups)).sum(-1)
        d_q_QGrD, d_k, d_v = torch.zeros_like(q_QGrD), torch.zeros_like(k), torch.zeros_like(v)

        # The query itself, where it reads itself.
        if ctx.spans[0].reading is Reading.STRICT:
            own_Q = reads_4Q[2]
            own_k_QGD, own_v_QGD = k.index_select(0, own_Q), v.index_select(0, own_Q)
            scores_QGr = torch.einsum("qgrd,qgd->qgr", q_QGrD, own_k_QGD)
            probabilities_QGr = (scores_QGr - lse_QGr).exp_()
            d_scores_QGr = probabilities_QGr * (
                torch.einsum("qgrd,qgd->qgr", d_out_QGrD, own_v_QGD) - delta_QGr
            )
            d_q_QGrD = d_scores_QGr[..., None] * own_k_QGD[:, :, None]
            # No two queries are the same row, so the copies have an order-free result.
            d_v.index_copy_(0, own_Q, torch.einsum("qgr,qgrd->qgd", probabilities_QGr, d_out_QGrD))
            d_k.index_copy_(0, own_Q, torch.einsum("qgr,qgrd->qgd", d_scores_QGr, q_QGrD))

        # The rows of each tile.
        for tile in _tiles(ctx.spans):
            tile_k, tile_v = _take(k, tile), _take(v, tile)
            scores_Grtn = _score(q_QGrD[tile.queries], tile_k, tile, reads_4Q)
            probabilities = (scores_Grtn - lse_QGr[tile.queries].permute(1, 2, 0)[..., None]).exp_()
            d_out_tGrD = d_out_QGrD[tile.queries]
            _add(d_v, tile, torch.einsum("grtn,tgrd->ngd", probabilities, d_out_tGrD))
            d_scores_Grtn = torch.einsum("tgrd,ngd->grtn", d_out_tGrD, tile_v)
            d_scores_Grtn -= delta_QGr[tile.queries].permute(1, 2, 0)[..., None]
            d_scores_Grtn *= probabilities
            _add(d_k, tile, torch.einsum("grtn,tgrd->ngd", d_scores_Grtn, q_QGrD[tile.queries]))
            d_q_QGrD[tile.queries] += torch.einsum("grtn,ngd->tgrd", d_scores_Grtn, tile_k)
        d_q = (d_q_QGrD * scale).flatten(1, 2)
        return *(gradient.to(d_out_QHD.dtype) for gradient in (d_q, d_k, d_v)), None, None


def _tiles(spans: tuple[Span, ...]) -> Iterator[_Tile]:
    """Yield the tiles that read any row but the query itself, in the order of their queries.

    Long spans are cut; small ones of the same stream share a tile.
    """
    cut = _cut_strict if spans[0].reading is Reading.STRICT else _cut_blocks
    first_query, merged = 0, list[Span]()
    for span in spans:
        size = sum(each.num_rows for each in merged)
        if merged and (
            size + span.num_rows > TILE_QUERIES or span.first_key != merged[-1].first_key
        ):
            yield from cut(merged, first_query)
            first_query, merged = first_query + size, []
        merged.append(span)
    yield from cut(merged, first_query)


def _cut_strict(spans: list[Span], first_query: int) -> Iterator[_Tile]:
    """Yield the tiles of one span, or the one tile of several."""
    num_queries = sum(span.num_rows for span in spans)
    fewest_keys = min(span.num_keys - span.num_rows + 1 for span in spans)
    most_keys = max(span.num_keys for span in spans)
    for start in range(0, num_queries, TILE_QUERIES):
        end = min(start + TILE_QUERIES, num_queries)
        num_keys = most_keys - num_queries + end
        if num_keys:
            yield _Tile(
                queries=slice(first_query + start, first_query + end),
                keys=slice(spans[0].first_key, spans[0].first_key + num_keys),
                num_common=fewest_keys + start,
                own=slice(0),
                is_merged=False,
            )


def _cut_blocks(spans: list[Span], first_query: int) -> Iterator[_Tile]:
    num_keys = [span.num_keys for span in spans]
    num_queries = sum(span.num_rows for span in spans)
    for start in range(0, num_queries, TILE_QUERIES):
        end = min(start + TILE_QUERIES, num_queries)
        yield _Tile(
            queries=slice(first_query + start, first_query + end),
            keys=slice(spans[0].first_key, spans[0].first_key + max(num_keys)),
            num_common=min(num_keys),
            own=slice(spans[0].first_own, spans[-1].first_own + spans[-1].num_own),
            is_merged=len(spans) > 1,
        )


def _score(q_tGrD: Tensor, k_nGD: Tensor, tile: _Tile, reads_4Q: Tensor) -> Tensor:
    """Return a tile's scores `[G, r, t, n]`, -inf where the query does not read the row."""
    scores_Grtn = torch.einsum("tgrd,ngd->grtn", q_tGrD, k_nGD)
    num_keys = tile.keys.stop - tile.keys.start
    if num_keys > tile.num_common or tile.is_merged:
        # Hide keys that only other queries of the tile read, and rows of other blocks.
        reads_4t1 = reads_4Q[:, tile.queries, None]
        keys_n = torch.arange(tile.num_common, num_keys, device=q_tGrD.device)
        is_hidden = keys_n >= reads_4t1[1]
        if tile.is_merged:
            own_n = torch.arange(tile.own.start, tile.own.stop, device=q_tGrD.device)
            is_other = (own_n < reads_4t1[2]) | (own_n >= reads_4t1[2] + reads_4t1[3])
            is_hidden = torch.cat([is_hidden, is_other], dim=1)
        scores_Grtn[..., tile.num_common :].masked_fill_(is_hidden, -torch.inf)
    return scores_Grtn


def _take(x_RGD: Tensor, tile: _Tile) -> Tensor:
    """Return the rows that a tile reads, `[n, G, D]`: keys of its stream, then own rows."""
    if tile.own.stop == 0:
        return x_RGD[tile.keys]
    return torch.cat([x_RGD[tile.keys], x_RGD[tile.own]])


def _add(x_RGD: Tensor, tile: _Tile, values_nGD: Tensor) -> None:
    """Add values to the rows that a tile reads."""
    num_keys = tile.keys.stop - tile.keys.start
    x_RGD[tile.keys] += values_nGD[:num_keys]
    if tile.own.stop:
        x_RGD[tile.own] += values_nGD[num_keys:]


def _group_heads(x_QHD: Tensor, num_groups: int) -> Tensor:
    return x_QHD.view(x_QHD.shape[0], num_groups, -1, x_QHD.shape[2])


def _upcast(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
