"""From the losses of single rows to the objective and to the NELBO.

Each phase's loss is the weighted sum over its masked tokens, divided by *all* real tokens of that
phase in the global batch: not by the masked ones, and not by a rank's or micro-batch's own (the
reference's algo.py, `EsoLM.loss`). With the "elbo" weights the sum of both phases is then the NELBO
in nats per token.

Shapes: B samples of a micro-batch, E loss rows, N samples of a step or of a validation set.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_eso.objectives.dealing import Dealing
from megatron_eso.objectives.rows import RowPlan

NUM_TIME_BINS = 10


@dataclass(frozen=True, slots=True)
class PhaseTokens:
    """Real tokens of each phase in a global batch, masked or not: the denominators of the loss."""

    diffusion: int
    sequential: int

    @property
    def total(self) -> int:
        """Real tokens of the global batch."""
        return self.diffusion + self.sequential


@dataclass(frozen=True, kw_only=True, slots=True)
class NelboEstimate:
    """The NELBO of a validation set in nats per token, and its parts: one for each phase.

    `nelbo` is `diffusion + sequential`. `diffusion_by_t` has the mean over the samples of each
    tenth of the times, by its middle; weighted by their numbers these make `diffusion`.
    `standard_error` is that of the mean over samples, nan for
    one sample; times are stratified over the set, so it errs on the large side.
    """

    nelbo: float
    standard_error: float
    diffusion: float
    sequential: float
    diffusion_by_t: Mapping[float, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """Returns exp(NELBO), infinite where that is beyond float64."""
        return to_perplexity(self.nelbo)


def count_phase_tokens(dealing: Dealing, length_N: NDArray[np.int64]) -> PhaseTokens:
    """Returns the denominators of a step's loss.

    Args:
        dealing: Tells the phase of each place.
        length_N: Real tokens of the step's samples, by place.
    """
    is_sequential_N = dealing.is_sequential(np.arange(dealing.global_batch_size))
    return PhaseTokens(
        diffusion=int(length_N[~is_sequential_N].sum()),
        sequential=int(length_N[is_sequential_N].sum()),
    )


def sum_phases(nll_E: Tensor, weights_E: Tensor, plan: RowPlan) -> Tensor:
    """Returns `[2]`: the weighted sums of the diffusion phase and of the sequential phase.

    Args:
        nll_E: `-log p(target)` in nats of the plan's loss rows, with or without padding; anything,
            even inf, at padding.
        weights_E: `plan.weights_E` for the objective, `plan.elbo_weights_E` for the NELBO.
        plan: The rows.
    """
    weighted_E = _weigh(nll_E, weights_E, plan)
    is_sequential_E = plan.is_sequential_E[: plan.num_loss_rows]
    return torch.stack(
        [
            weighted_E.masked_fill(is_sequential_E, 0).sum(),
            weighted_E.masked_fill(~is_sequential_E, 0).sum(),
        ]
    )


def normalize_phases(sums: Tensor, tokens: PhaseTokens) -> Tensor:
    """Divides `[2]` sums by the tokens of their phases; the loss is the sum of both quotients.

    A phase without tokens stays 0.
    """
    return sums / sums.new_tensor([max(tokens.diffusion, 1), max(tokens.sequential, 1)])


def sum_samples(nll_E: Tensor, plan: RowPlan, num_samples: int) -> Tensor:
    """Returns float64 `[B]`: each sample's sum with ELBO weights, 0 for samples without loss rows.

    Given the same losses, a sample's sum is the same whatever else the micro-batch holds.
    """
    sums = torch.zeros(num_samples, dtype=torch.float64, device=nll_E.device)
    if plan.num_loss_rows == 0:
        return sums
    weighted_E = _weigh(nll_E.double(), plan.elbo_weights_E.double(), plan)
    parts = torch.split(weighted_E, list(plan.loss_lengths))
    last_rows = torch.tensor(plan.loss_lengths, device=nll_E.device).cumsum(0) - 1
    samples = plan.sample_E[last_rows]
    return sums.index_copy(0, samples, torch.stack([part.sum() for part in parts]))


def estimate_nelbo(
    diffusion_N: NDArray[np.float64], sequential_N: NDArray[np.float64], sequence_length: int
) -> NelboEstimate:
    """Estimates the NELBO of a validation set, each of whose samples went through both phases.

    Args:
        diffusion_N: `sum_samples` of each sample in the diffusion phase; zeros at alpha_0 = 0.
        sequential_N: The same in the sequential phase; zeros at alpha_0 = 1.
        sequence_length: T.

    Raises:
        ValueError: There are no samples, or not the same number for both phases.
    """
    if len(diffusion_N) != len(sequential_N) or len(diffusion_N) == 0:
        raise ValueError(f"{len(diffusion_N)} diffusion and {len(sequential_N)} sequential samples")
    nelbo_N = (diffusion_N + sequential_N) / sequence_length
    error = float(nelbo_N.std(ddof=1)) / math.sqrt(len(nelbo_N)) if len(nelbo_N) > 1 else math.nan
    return NelboEstimate(
        nelbo=float(nelbo_N.mean()),
        standard_error=error,
        diffusion=float(diffusion_N.mean()) / sequence_length,
        sequential=float(sequential_N.mean()) / sequence_length,
    )


def mean_by_time(values_N: NDArray[np.float64], t_N: NDArray[np.float64]) -> dict[float, float]:
    """Returns the mean of the values of each tenth of the times, by its middle; of empty ones none.

    Args:
        values_N: A value of each sample.
        t_N: Its time in [0, 1].
    """
    tenth_N = np.minimum((t_N * NUM_TIME_BINS).astype(np.int64), NUM_TIME_BINS - 1)
    return {
        (tenth + 0.5) / NUM_TIME_BINS: float(values_N[tenth_N == tenth].mean())
        for tenth in np.unique(tenth_N).tolist()
    }


def to_perplexity(nats_per_token: float) -> float:
    """Returns exp of a loss in nats per token, infinite where that is beyond float64."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


def _weigh(nll_E: Tensor, weights_E: Tensor, plan: RowPlan) -> Tensor:
    """Returns weighted losses without padding, where 0 * inf could stand."""
    return nll_E[: plan.num_loss_rows] * weights_E[: plan.num_loss_rows]
