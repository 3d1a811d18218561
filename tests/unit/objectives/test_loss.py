"""Denominators of the losses, padding, and estimates of the NELBO."""

import math

import numpy as np
import pytest
import torch

from megatron_eso.batches.dealing import Dealing, count_tokens
from megatron_eso.batches.loss import (
    estimate_nelbo,
    normalize_phases,
    sum_phases,
    sum_samples,
    to_perplexity,
)
from megatron_eso.batches.rows import LossRows
from megatron_eso.objectives.noise.schedule import LogLinearSchedule
from megatron_eso.objectives.noise.slots import draw_noise, validation_times
from tests.support.planning import eso_lm, plan_noise

SEED, MASK, LENGTH = 5, 50, 32
NAMES = ("diffusion", "sequential")


def draw_loss_rows(row_multiple: int = 8) -> LossRows:
    noise = draw_noise(
        SEED,
        np.arange(4),
        np.array([False, True] * 2),
        np.full(4, 0.5),
        LogLinearSchedule(0.5),
        LENGTH,
    )
    x_0 = np.zeros((4, LENGTH), dtype=np.int64)
    return plan_noise(eso_lm(MASK, alpha_0=0.5), x_0, noise, row_multiple=row_multiple).loss


def test_each_phase_is_divided_by_all_tokens_of_its_samples() -> None:
    tokens = count_tokens(np.full(8, LENGTH), Dealing(8, 1, 1, 0.75).split.phases(np.arange(8)), 2)
    assert tokens == (6 * LENGTH, 2 * LENGTH)
    sums = torch.tensor([3.0, 5.0])
    expected = [3 / (6 * LENGTH), 5 / (2 * LENGTH)]
    torch.testing.assert_close(normalize_phases(sums, tokens), torch.tensor(expected))


def test_samples_that_are_cut_count_by_their_length() -> None:
    dealing = Dealing(4, 1, 1, 0.5)
    is_sequential = dealing.split.phases(np.arange(4)) == 1
    length = np.where(is_sequential, [1, 2, 3, 4], [10, 20, 30, 40])
    diffusion, sequential = count_tokens(length, dealing.split.phases(np.arange(len(length))), 2)
    assert sequential == sum(n for n in length if n < 10)
    assert diffusion == sum(n for n in length if n >= 10)


@pytest.mark.parametrize("alpha_0", [0, 1])
def test_a_phase_without_tokens_adds_nothing(alpha_0: int) -> None:
    tokens = count_tokens(
        np.full(2, LENGTH), Dealing(2, 1, 1, alpha_0).split.phases(np.arange(2)), 2
    )
    sums = torch.tensor([4.0 * alpha_0, 4.0 * (1 - alpha_0)])
    assert normalize_phases(sums, tokens).sum().item() == 4 / (2 * LENGTH)


@pytest.mark.parametrize("padded", [False, True])
def test_sums_ignore_the_values_at_padding(padded: bool) -> None:
    loss = draw_loss_rows(row_multiple=64)
    assert loss.num_real < len(loss.targets_E)
    nll = torch.rand(len(loss.targets_E), dtype=torch.float64)
    nll[loss.num_real :] = torch.inf
    nll = (nll if padded else nll[: loss.num_real]).requires_grad_()
    sums = sum_phases(nll, loss.weights_E, loss, 2)
    real = slice(loss.num_real)
    weighted, is_sequential = (nll * loss.weights_E[: len(nll)])[real], loss.phase_E[real] == 1
    assert sums[0].item() == pytest.approx(weighted[~is_sequential].sum().item(), rel=1e-12)
    assert sums[1].item() == pytest.approx(weighted[is_sequential].sum().item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(sums.sum(), nll)
    assert torch.equal(gradient, loss.weights_E[: len(nll)].double())


def test_a_samples_sum_holds_its_rows_only() -> None:
    loss = draw_loss_rows()
    nll = torch.rand(len(loss.targets_E))
    expected = torch.zeros(4, dtype=torch.float64).index_add(
        0, loss.sample_E, nll.double() * loss.elbo_weights_E.double()
    )
    torch.testing.assert_close(sum_samples(nll, loss, 4), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha_0", [1.0, 0.5, 0.125, 0.0])
def test_the_nelbo_of_equal_odds_is_the_vocabularys_logarithm(alpha_0: float) -> None:
    """Estimate it from plans: E[weight * masked share] is 0.999 alpha_0, and 1 - alpha_0."""
    num_samples, nll = 400, math.log(MASK)
    samples = np.arange(num_samples)
    entries, is_sequential = np.tile(samples, 2), np.repeat([False, True], num_samples)
    times = np.tile(validation_times(SEED, samples, num_samples), 2)
    noise = draw_noise(
        SEED, entries, is_sequential, times, LogLinearSchedule(alpha_0), LENGTH, is_validation=True
    )
    x_0 = np.zeros((len(entries), LENGTH), dtype=np.int64)
    loss = plan_noise(eso_lm(MASK, alpha_0=alpha_0, loss_type="low_var"), x_0, noise).loss
    sums = sum_samples(torch.full((len(loss.targets_E),), nll), loss, len(entries)).numpy()
    phases = np.zeros((2, num_samples))
    np.add.at(phases, (noise.is_sequential_B.astype(int), entries), sums)
    estimate = estimate_nelbo(phases, NAMES, LENGTH)
    assert estimate.nelbo == pytest.approx(sum(estimate.phases.values()), rel=1e-12)
    expected = nll * (1 - 1e-3 * alpha_0)
    assert abs(estimate.nelbo - expected) <= 5 * estimate.standard_error + 1e-6
    assert estimate.standard_error < 0.1
    assert estimate.perplexity == math.exp(estimate.nelbo)


def test_the_standard_error_is_that_of_the_mean_per_token() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0])
    estimate = estimate_nelbo(np.stack([values, 2 * values]), NAMES, 10)
    assert estimate.nelbo == pytest.approx(1.2)
    assert estimate.standard_error == pytest.approx(0.3 * values.std(ddof=1) / 2)
    assert math.isnan(estimate_nelbo(np.ones((2, 1)), NAMES, 10).standard_error)


def test_perplexity_of_a_diverged_model_is_infinite() -> None:
    assert to_perplexity(1e4) == math.inf
    assert to_perplexity(0.0) == 1


def test_an_estimate_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        estimate_nelbo(np.zeros((2, 0)), NAMES, 4)
