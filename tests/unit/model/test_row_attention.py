"""Row attention compared with softmax over dense masks, built row by row, in float64."""

from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_eso.model.attention_backend import BACKENDS, AttentionBackend
from megatron_eso.model.row_attention import attend_loss_rows, attend_rows
from megatron_eso.model.spans import QuerySpan
from megatron_eso.model.torch_attention import TILE_QUERIES
from megatron_eso.objectives.noise import Noise
from megatron_eso.objectives.rows import Rows
from tests.support.planning import eso_lm, plan_noise

FLOAT64_TOLERANCE = 1e-10
# Values and gradients here are below 8, where the distance of bfloat16 numbers is 2**-5.
BFLOAT16_TOLERANCE = 2**-5
HEAD_DIM = 4


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    return BACKENDS[request.param]()


def rows_of(diffusion: list[int], sequential: list[int], length: int, multiple: int = 1) -> Rows:
    """Plan rows of samples with given numbers of masked tokens."""
    counts = np.array(diffusion + sequential, dtype=np.int64)
    noise = Noise(
        length_B=np.full(len(counts), length),
        is_masked_BT=np.arange(length) >= length - counts[:, None],
        permutation_BT=np.tile(np.arange(length), (len(counts), 1)),
        t_B=np.full(len(counts), 0.5),
        is_sequential_B=np.repeat([False, True], [len(diffusion), len(sequential)]),
    )
    x_0 = np.zeros((len(counts), length), dtype=np.int64)
    return plan_noise(eso_lm(1, alpha_0=0.5), x_0, noise, row_multiple=multiple).rows


def starts(lengths: tuple[int, ...]) -> list[int]:
    return [0, *accumulate(lengths)]


def visible_to_rows(rows: Rows) -> Tensor:
    """Mask `[R, R]`: which rows each row reads in the body layers."""
    visible = torch.zeros(len(rows.tokens_R), len(rows.tokens_R), dtype=torch.bool)
    first_rows = starts(rows.stream_lengths)
    for first, length in zip(first_rows, rows.stream_lengths, strict=False):
        for slot in range(length):
            visible[first + slot, first : first + slot + 1] = True
    row = first_rows[-1]
    sequential = range(rows.num_mixed_streams, len(rows.stream_lengths))
    for stream, num_queries in zip(sequential, rows.query_lengths, strict=True):
        length = rows.stream_lengths[stream] + 1
        for slot in range(length - num_queries, length):
            visible[row, first_rows[stream] : first_rows[stream] + slot] = True
            visible[row, row] = True
            row += 1
    assert row == rows.num_rows
    return visible


def visible_to_loss_rows(rows: Rows) -> Tensor:
    """Mask `[E, R]`: which rows each loss row reads in the last layer."""
    visible = torch.zeros(len(rows.loss_rows_E), len(rows.tokens_R), dtype=torch.bool)
    visible[: rows.num_loss_rows] = visible_to_rows(rows)[rows.loss_rows_E[: rows.num_loss_rows]]
    return visible


def attend_densely(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    reads_nothing = ~visible.any(1, keepdim=True)
    scores = scores.masked_fill(~visible & ~reads_nothing, -torch.inf)
    probabilities = scores.softmax(-1).masked_fill(reads_nothing, 0)
    return torch.einsum("hqk,khd->qhd", probabilities, v)


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def draw_inputs(rows: Rows, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw queries of all rows, keys, values, and the gradient of the output."""
    num = len(rows.tokens_R)
    q, out = draw(0, num, heads, HEAD_DIM), draw(3, num, heads, HEAD_DIM)
    return q, draw(1, num, groups, HEAD_DIM), draw(2, num, groups, HEAD_DIM), out


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        (x.double() - y.double()).abs().max().item() if x.numel() else 0.0
        for x, y in zip(found, expected, strict=True)
    )


def compare(
    rows: Rows,
    heads: int,
    groups: int,
    backend: AttentionBackend,
    dtype: torch.dtype = torch.float64,
) -> tuple[float, float]:
    """Return the largest differences from dense attention: of the body, and of the last layer."""
    q, k, v, d_out = (x.to(dtype).double() for x in draw_inputs(rows, heads, groups))
    differences = []
    for visible, attend, chosen in (
        (visible_to_rows(rows), attend_rows, torch.arange(len(q))),
        (visible_to_loss_rows(rows), attend_loss_rows, rows.loss_rows_E),
    ):
        results = []
        for attention, others, precision in (
            (attend, (rows, backend), dtype),
            (attend_densely, (visible,), torch.float64),
        ):
            inputs = [x[chosen] if x is q else x for x in (q, k, v)]
            inputs = [x.to(precision).requires_grad_() for x in inputs]
            out = attention(*inputs, *others)
            grads = torch.autograd.grad(
                out, inputs, d_out[: len(out)].to(precision), materialize_grads=True
            )
            results.append([out, *grads])
        assert all(x.dtype == dtype for x in results[0])
        differences.append(largest_difference(*results))
    return differences[0], differences[1]


@pytest.mark.parametrize(
    "counts",
    [
        ([3], []),
        ([], [3]),
        ([7, 1], [7, 1]),
        ([2, 5, 4], [6, 1, 3]),
        ([0, 3, 0], [0, 2]),
        ([7, 7], [7, 7]),
    ],
)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("multiple", [1, 16])
def test_rows_attend_as_under_a_dense_mask(
    counts: tuple[list[int], list[int]],
    heads: int,
    groups: int,
    multiple: int,
    backend: AttentionBackend,
) -> None:
    rows = rows_of(*counts, length=7, multiple=multiple)
    assert max(compare(rows, heads, groups, backend)) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("counts", [([1], []), ([], [1]), ([1, 1], [1]), ([0], [0])])
def test_samples_of_one_token_attend_to_themselves(
    counts: tuple[list[int], list[int]], backend: AttentionBackend
) -> None:
    rows = rows_of(*counts, length=1, multiple=4)
    q, k, v, _ = draw_inputs(rows, 2, 1)
    for attend in (attend_rows, attend_loss_rows):
        out = attend(q, k, v, rows, backend)
        assert torch.allclose(out[: rows.num_rows], v.expand(-1, 2, -1)[: rows.num_rows])
        assert not out[rows.num_rows :].any()
    assert max(compare(rows, 2, 1, backend)) < FLOAT64_TOLERANCE


def test_queries_of_several_tiles_attend_as_under_a_dense_mask(backend: AttentionBackend) -> None:
    length = TILE_QUERIES + 20
    rows = rows_of([TILE_QUERIES + 1], [length, TILE_QUERIES], length)
    assert max(compare(rows, 2, 1, backend)) < FLOAT64_TOLERANCE


def test_bfloat16_inputs_lose_no_more_than_their_rounding(backend: AttentionBackend) -> None:
    rows = rows_of([90, 20], [100, 70], length=100, multiple=8)
    assert max(compare(rows, 4, 2, backend, torch.bfloat16)) < BFLOAT16_TOLERANCE


def test_large_scores_neither_overflow_nor_vanish(backend: AttentionBackend) -> None:
    rows = rows_of([], [5], length=5)
    q, k, v, _ = draw_inputs(rows, 2, 2)
    inputs = [(1e4 * q).requires_grad_(), (1e2 * k).requires_grad_(), v.requires_grad_()]
    out = attend_rows(*inputs, rows, backend)
    assert largest_difference([out], [attend_densely(*inputs, visible_to_rows(rows))]) < 1e-9
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "spans",
    [
        (QuerySpan(3, 0, 4),),
        (QuerySpan(1, 0, 0),),  # no key before the only slot
        (QuerySpan(3, 0, 2), QuerySpan(2, 3, 4)),  # the first query has no keys; a gap of keys
        (QuerySpan(0, 0, 2), QuerySpan(1, 2, 5), QuerySpan(1, 7, 0)),
    ],
)
def test_the_backward_is_the_derivative(
    spans: tuple[QuerySpan, ...], groups: int, backend: AttentionBackend
) -> None:
    num_queries = sum(span.num_queries for span in spans)
    num_keys = max(span.first_key + span.num_keys for span in spans)
    shapes = [
        (num_queries, 4, 2),
        (num_keys, groups, 2),
        (num_keys, groups, 2),
        (num_queries, groups, 2),
        (num_queries, groups, 2),
    ]
    inputs = [draw(i, *shape).requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(
        lambda *tensors: backend.attend_strictly(*tensors, spans), inputs
    )


def test_a_micro_batch_without_rows_gives_zeros_and_zero_gradients(
    backend: AttentionBackend,
) -> None:
    rows = rows_of([0], [0, 0], length=5, multiple=2)
    inputs = [x.requires_grad_() for x in draw_inputs(rows, 2, 2)[:3]]
    for attend in (attend_rows, attend_loss_rows):
        out = attend(*inputs, rows, backend)
        assert out.shape == inputs[0].shape
        assert not out.any()
        # No gradient is None: each parameter takes part in each micro-batch.
        assert not any(x.any() for x in torch.autograd.grad(out.sum(), inputs))
