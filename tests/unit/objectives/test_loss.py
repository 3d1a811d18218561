"""Denominators, padding, and the NELBO's estimate."""

import math

import numpy as np
import pytest
import torch

from megatron_eso.objectives.dealing import Dealing
from megatron_eso.objectives.loss import (
    PhaseTokens,
    count_phase_tokens,
    estimate_nelbo,
    normalize_phases,
    sum_phases,
    sum_samples,
    to_perplexity,
)
from megatron_eso.objectives.noise import draw_noise, validation_times
from megatron_eso.objectives.rows import RowPlan, plan_rows
from megatron_eso.objectives.schedule import LogLinearSchedule

SEED, MASK, LENGTH = 5, 50, 32


def draw_plan(row_multiple: int = 8) -> RowPlan:
    noise = draw_noise(
        SEED, np.arange(4), np.array([False, True] * 2), np.full(4, 0.5), 0.5, LENGTH
    )
    return plan_rows(
        np.zeros((4, LENGTH), dtype=np.int64),
        noise,
        schedule=LogLinearSchedule(0.5),
        loss_type="elbo",
        mask_token_id=MASK,
        row_multiple=row_multiple,
    )


def test_each_phase_is_divided_by_all_tokens_of_its_samples() -> None:
    tokens = count_phase_tokens(Dealing(8, 1, 1, 0.75), np.full(8, LENGTH))
    assert tokens == PhaseTokens(diffusion=6 * LENGTH, sequential=2 * LENGTH)
    sums = torch.tensor([3.0, 5.0])
    expected = [3 / (6 * LENGTH), 5 / (2 * LENGTH)]
    torch.testing.assert_close(normalize_phases(sums, tokens), torch.tensor(expected))


def test_samples_that_are_cut_count_by_their_length() -> None:
    dealing = Dealing(4, 1, 1, 0.5)
    is_sequential = dealing.is_sequential(np.arange(4))
    length = np.where(is_sequential, [1, 2, 3, 4], [10, 20, 30, 40])
    tokens = count_phase_tokens(dealing, length)
    assert tokens.sequential == sum(n for n in length if n < 10)
    assert tokens.diffusion == sum(n for n in length if n >= 10)
    assert tokens.total == length.sum()


@pytest.mark.parametrize("alpha_0", [0, 1])
def test_a_phase_without_tokens_adds_nothing(alpha_0: int) -> None:
    tokens = count_phase_tokens(Dealing(2, 1, 1, alpha_0), np.full(2, LENGTH))
    sums = torch.tensor([4.0 * alpha_0, 4.0 * (1 - alpha_0)])
    assert normalize_phases(sums, tokens).sum().item() == 4 / (2 * LENGTH)


@pytest.mark.parametrize("padded", [False, True])
def test_sums_are_those_of_real_rows_whatever_stands_at_padding(padded: bool) -> None:
    plan = draw_plan(row_multiple=64)
    assert plan.num_loss_rows < len(plan.targets_E)
    nll = torch.rand(len(plan.targets_E), dtype=torch.float64)
    nll[plan.num_loss_rows :] = torch.inf
    nll = (nll if padded else nll[: plan.num_loss_rows]).requires_grad_()
    sums = sum_phases(nll, plan.weights_E, plan)
    real = slice(plan.num_loss_rows)
    weighted, is_sequential = (nll * plan.weights_E[: len(nll)])[real], plan.is_sequential_E[real]
    assert sums[0].item() == pytest.approx(weighted[~is_sequential].sum().item(), rel=1e-12)
    assert sums[1].item() == pytest.approx(weighted[is_sequential].sum().item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(sums.sum(), nll)
    assert torch.equal(gradient, plan.weights_E[: len(nll)].double())


def test_a_samples_sum_holds_its_rows_only() -> None:
    plan = draw_plan()
    nll = torch.rand(len(plan.targets_E))
    expected = torch.zeros(4, dtype=torch.float64).index_add(
        0, plan.sample_E, nll.double() * plan.elbo_weights_E.double()
    )
    torch.testing.assert_close(sum_samples(nll, plan, 4), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha_0", [1.0, 0.5, 0.125, 0.0])
def test_the_nelbo_of_equal_odds_is_the_vocabularys_logarithm(alpha_0: float) -> None:
    """Through noise, plan and sums: E[weight * masked share] is 0.999 alpha_0, and 1 - alpha_0."""
    num_samples, nll = 400, math.log(MASK)
    samples = np.arange(num_samples)
    entries, is_sequential = np.tile(samples, 2), np.repeat([False, True], num_samples)
    times = np.tile(validation_times(SEED, samples, num_samples), 2)
    noise = draw_noise(SEED, entries, is_sequential, times, alpha_0, LENGTH, is_validation=True)
    plan = plan_rows(
        np.zeros((len(entries), LENGTH), dtype=np.int64),
        noise,
        schedule=LogLinearSchedule(alpha_0),
        loss_type="low_var",
        mask_token_id=MASK,
        row_multiple=1,
    )
    sums = sum_samples(torch.full((len(plan.targets_E),), nll), plan, len(entries)).numpy()
    phases = np.zeros((2, num_samples))
    np.add.at(phases, (noise.is_sequential_B.astype(int), entries), sums)
    estimate = estimate_nelbo(*phases, LENGTH)
    assert estimate.nelbo == pytest.approx(estimate.diffusion + estimate.sequential, rel=1e-12)
    expected = nll * (1 - 1e-3 * alpha_0)
    assert abs(estimate.nelbo - expected) <= 5 * estimate.standard_error + 1e-6
    assert estimate.standard_error < 0.1
    assert estimate.perplexity == math.exp(estimate.nelbo)


def test_the_standard_error_is_that_of_the_mean_per_token() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0])
    estimate = estimate_nelbo(values, 2 * values, 10)
    assert estimate.nelbo == pytest.approx(1.2)
    assert estimate.standard_error == pytest.approx(0.3 * values.std(ddof=1) / 2)
    assert math.isnan(estimate_nelbo(values[:1], values[:1], 10).standard_error)


def test_perplexity_of_a_diverged_model_is_infinite() -> None:
    assert to_perplexity(1e4) == math.inf
    assert to_perplexity(0.0) == 1


def test_an_estimate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0 diffusion"):
        estimate_nelbo(np.array([]), np.array([]), 4)
