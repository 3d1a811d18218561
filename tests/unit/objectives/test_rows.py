"""The rows of a micro-batch; the dense oracle shows that they give the correct losses."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_eso.batches.rows import LossRows, MicroBatch, Reading, Rows, Span
from megatron_eso.objectives.noise.slots import Noise
from tests.support.planning import eso_lm, plan_noise

MASK = 99
T = 4

# A sequential sample, a diffusion sample without masks, a diffusion sample with two.
NOISE = Noise(
    length_B=np.full(3, T),
    is_masked_BT=np.array([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 1]], dtype=np.bool_),
    permutation_BT=np.array([[2, 0, 1, 3], [3, 1, 2, 0], [1, 2, 3, 0]]),
    t_B=np.array([np.nan, 0.5, 0.5]),
    is_sequential_B=np.array([True, False, False]),
)
X_0 = np.array([[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]])


def plan(
    x_0: np.ndarray = X_0,
    noise: Noise = NOISE,
    *,
    row_multiple: int = 1,
    alpha_0: float = 0.5,
    loss_type: str = "elbo",
) -> MicroBatch:
    objective = eso_lm(MASK, alpha_0=alpha_0, loss_type=loss_type)
    return plan_noise(objective, x_0, noise, row_multiple=row_multiple)


def test_rows_are_packed_diffusion_first_then_clean_streams_then_queries() -> None:
    batch = plan()
    rows, loss = batch.rows, batch.loss
    assert rows.spans == (
        Span(Reading.CAUSAL, T, 0, T),
        Span(Reading.CAUSAL, T - 1, T, T - 1),
        Span(Reading.STRICT, 2, T, T - 1),
    )
    assert rows.loss_spans == (Span(Reading.STRICT, 2, 0, T - 1), Span(Reading.STRICT, 2, T, T - 1))
    assert rows.reads_4R.T.tolist() == [
        *([0, slot, slot, 1] for slot in range(T)),
        *([T, slot, T + slot, 1] for slot in range(T - 1)),
        [T, 2, 7, 1],
        [T, 3, 8, 1],
    ]
    assert rows.tokens_R.tolist() == [31, 32, MASK, MASK, 12, 10, 11, MASK, MASK]
    assert rows.positions_R.tolist() == [1, 2, 3, 0, 2, 0, 1, 1, 3]
    assert rows.loss_rows_E.tolist() == [2, 3, 7, 8]
    assert loss.targets_E.tolist() == [33, 30, 11, 13]
    assert loss.phase_E.tolist() == [0, 0, 1, 1]
    assert loss.sample_E.tolist() == [2, 2, 0, 0]
    assert loss.lengths == (2, 2)
    assert batch.phase_B.tolist() == [1, 0, 0]
    assert (rows.num_rows, rows.num_loss_rows) == (9, 4)


def test_positions_beyond_a_samples_length_have_no_row() -> None:
    """Plan lengths 3, 1 and 2: a sequential sample, a single masked token, a diffusion sample."""
    noise = Noise(
        length_B=np.array([3, 1, 2]),
        is_masked_BT=np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]], dtype=np.bool_),
        permutation_BT=np.array([[2, 0, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3]]),
        t_B=np.array([np.nan, np.nan, 0.5]),
        is_sequential_B=np.array([True, True, False]),
    )
    # Only positions within the lengths have rows.
    batch = plan(noise=noise)
    rows, loss = batch.rows, batch.loss
    assert rows.spans == (
        Span(Reading.CAUSAL, 2, 0, 2),
        Span(Reading.CAUSAL, 2, 2, 2),
        Span(Reading.STRICT, 1, 2, 2),
        Span(Reading.STRICT, 1, 5, 0),
    )
    assert rows.tokens_R.tolist() == [30, MASK, 12, 10, MASK, MASK]
    assert rows.positions_R.tolist() == [0, 1, 2, 0, 1, 0]
    assert rows.loss_rows_E.tolist() == [1, 4, 5]
    assert loss.targets_E.tolist() == [31, 11, 20]
    assert loss.sample_E.tolist() == [2, 0, 1]
    # Tokens and order beyond the length have no effect.
    x_0 = np.where(np.arange(T) < noise.length_B[:, None], X_0, -1)
    beyond = noise.permutation_BT.copy()
    beyond[2, 2:] = [3, 2]
    other = plan(x_0, dataclasses.replace(noise, permutation_BT=beyond))
    assert torch.equal(other.rows.tokens_R, rows.tokens_R)
    assert torch.equal(other.loss.targets_E, loss.targets_E)


def test_weights_are_those_of_the_loss_type() -> None:
    weight = 0.5 * 0.999 / (1 - 0.5 * (1 - 0.999 * 0.5))
    for loss_type, expected in (("elbo", weight), ("low_var", 1.0)):
        loss = plan(loss_type=loss_type).loss
        np.testing.assert_allclose(loss.weights_E, [expected] * 2 + [1.0] * 2, rtol=1e-6)
        np.testing.assert_allclose(loss.elbo_weights_E, [weight] * 2 + [1.0] * 2, rtol=1e-6)


@pytest.mark.parametrize("multiple", [1, 2, 4, 16])
def test_padding_fills_up_to_a_multiple_and_carries_no_loss(multiple: int) -> None:
    batch, exact = plan(row_multiple=multiple), plan()
    rows, loss = batch.rows, batch.loss
    for tensor in (rows.tokens_R, loss.targets_E):
        assert len(tensor) % multiple == 0
    assert len(rows.tokens_R) - rows.num_rows < multiple
    assert len(loss.targets_E) - rows.num_loss_rows < multiple
    assert (rows.tokens_R[rows.num_rows :] == MASK).all()
    padded = {"loss_rows_E": (rows.loss_rows_E, exact.rows.loss_rows_E)} | {
        field.name: (getattr(loss, field.name), getattr(exact.loss, field.name))
        for field in dataclasses.fields(LossRows)
        if field.name != "lengths"
    }
    for name, (values, expected) in padded.items():
        assert torch.equal(values[: rows.num_loss_rows], expected), name
        assert not values[rows.num_loss_rows :].any(), name
    assert not rows.positions_R[rows.num_rows :].any()
    assert not rows.reads_4R[:, rows.num_rows :].any()


def test_a_micro_batch_without_masks_is_padding_alone() -> None:
    noise = dataclasses.replace(NOISE, is_masked_BT=np.zeros((3, T), dtype=np.bool_))
    batch = plan(noise=noise, row_multiple=4)
    rows, loss = batch.rows, batch.loss
    assert (rows.num_rows, rows.num_loss_rows) == (0, 0)
    assert rows.spans == rows.loss_spans == ()
    assert len(rows.tokens_R) == len(loss.targets_E) == 4
    assert not loss.weights_E.any()


@pytest.mark.parametrize(("alpha_0", "is_sequential"), [(1.0, False), (0.0, True)])
def test_the_edges_of_alpha_0_compute_no_unneeded_row(alpha_0: float, is_sequential: bool) -> None:
    noise = dataclasses.replace(
        NOISE,
        is_masked_BT=np.ones((3, T), dtype=np.bool_),
        permutation_BT=np.tile(np.arange(T), (3, 1)),
        t_B=np.full(3, 1.0),
        is_sequential_B=np.full(3, is_sequential),
    )
    rows = plan(noise=noise, alpha_0=alpha_0).rows
    assert rows.num_rows == 3 * (2 * T - 1 if is_sequential else T)
    assert rows.num_loss_rows == 3 * T


def test_the_tensors_of_a_micro_batch_move_as_one() -> None:
    batch, moved = plan(), plan().to("meta")
    parts = [(Rows, batch.rows, moved.rows), (LossRows, batch.loss, moved.loss)]
    for kind, part, there in parts:
        for field in dataclasses.fields(kind):
            value, found = getattr(part, field.name), getattr(there, field.name)
            if isinstance(value, torch.Tensor):
                assert found.device.type == "meta"
                assert (found.dtype, found.shape) == (value.dtype, value.shape)
            else:
                assert value == found


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        plan(X_0[:, :3])


class Copies(TorchDispatchMode):
    """The number of copies from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += "_to_copy" in str(function)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("row_multiple", [1, 5])
def test_a_packed_micro_batch_is_copied_at_once(row_multiple: int) -> None:
    batch = plan(row_multiple=row_multiple)
    packed = batch.pack()
    with Copies() as copies:
        moved = packed.to("meta")
    assert copies.count == 1
    for name in ("rows", "loss"):
        own, kept, there = (getattr(each, name) for each in (batch, packed, moved))
        for field in dataclasses.fields(own):
            value, same, on_meta = (getattr(each, field.name) for each in (own, kept, there))
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, same)
                assert value.dtype == same.dtype
                assert (on_meta.device.type, on_meta.shape) == ("meta", value.shape)
            else:
                assert value == same == on_meta
