"""Row attention compared with softmax over dense masks, built row by row, in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_eso.batches.rows import STREAMS, Rows
from megatron_eso.model.attention_backend import BACKENDS, AttentionBackend
from megatron_eso.model.row_attention import attend_loss_rows, attend_rows
from megatron_eso.model.torch_attention import TILE_QUERIES
from megatron_eso.objectives.noise.slots import Noise
from tests.support.planning import FAMILY, eso_lm, family_rows, plan_noise

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


def visible_to_rows(rows: Rows) -> Tensor:
    """Mask `[R, R]`: which rows each row reads in the body layers."""
    visible = torch.zeros(len(rows.tokens_R), len(rows.tokens_R), dtype=torch.bool)
    for row, (first_key, num_keys, first_own, num_own) in enumerate(rows.reads_4R.T.tolist()):
        visible[row, first_key : first_key + num_keys] = True
        visible[row, first_own : first_own + num_own] = True
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
@pytest.mark.parametrize("name", ["eso_lm", "eso_lm a", "mdlm", "bd3_lm"])
def test_the_backward_is_the_derivative(name: str, groups: int, backend: AttentionBackend) -> None:
    """Differences in each element of the queries that read a part of a stream."""
    rows = family_rows(name, num_samples=2, length=5)
    spans = tuple(span for span in rows.loss_spans if span.reading not in STREAMS)
    assert len(spans) == len(rows.loss_spans)
    shape = (len(rows.tokens_R), groups, 2)
    inputs = [draw(0, len(rows.loss_rows_E), 4, 2), draw(1, *shape), draw(2, *shape)]
    reads = rows.reads_4R[:, rows.loss_rows_E]
    assert torch.autograd.gradcheck(
        lambda *tensors: backend.attend_prefixes(*tensors, reads, spans),
        [x.requires_grad_() for x in inputs],
    )


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 7, 40])
def test_rows_of_every_objective_attend_as_under_a_dense_mask(
    name: str, length: int, heads: int, groups: int, backend: AttentionBackend
) -> None:
    rows = family_rows(name, num_samples=4, length=length, row_multiple=8)
    assert max(compare(rows, heads, groups, backend)) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("name", ["mdlm", "bd3_lm", "eso_lm a"])
def test_blocks_of_several_tiles_attend_as_under_a_dense_mask(
    name: str, backend: AttentionBackend
) -> None:
    rows = family_rows(name, num_samples=3, length=2 * TILE_QUERIES + 30)
    assert max(compare(rows, 2, 1, backend)) < FLOAT64_TOLERANCE


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
