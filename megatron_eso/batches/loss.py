"""The losses of the phases and the NELBO, from the losses of single rows.

Each phase's loss is the weighted sum over its masked tokens, divided by *all* real tokens of that
phase in the global batch. It is not divided by the masked tokens, nor by the tokens of one rank or
micro-batch (the reference's algo.py, `EsoLM.loss`). The objective combines the phases. With the
weights of the NELBO, their sum is Eso-LM's NELBO in nats per token.

Shapes: B samples of a micro-batch, E loss rows, P phases, N samples of a validation set.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_eso.batches.rows import LossRows

NUM_TIME_BINS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class NelboEstimate:
    """The NELBO of a validation set in nats per token, and its parts.

    Attributes:
        nelbo: The mean over the samples.
        standard_error: Standard error of the mean over samples, nan for one sample. It is rather
            too large, because times are stratified over the set.
        phases: The part of each phase by its name; they add up to `nelbo`.
        by_time: For each phase that has times, the mean over the samples of each tenth of the
            times, by its middle.
    """

    nelbo: float
    standard_error: float
    phases: Mapping[str, float]
    by_time: Mapping[str, Mapping[float, float]] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """The perplexity exp(NELBO); infinite beyond float64."""
        return to_perplexity(self.nelbo)


def sum_phases(nll_E: Tensor, weights_E: Tensor, loss: LossRows, num_phases: int) -> Tensor:
    """Return `[P]`: the weighted sum of each phase.

    Args:
        nll_E: `-log p(target)` of the loss rows in nats, with or without padding. Padding may have
            any value, even inf.
        weights_E: `loss.weights_E` for the objective, `loss.elbo_weights_E` for the NELBO.
        loss: The loss rows.
        num_phases: P, the number of phases.
    """
    weighted_E = _weigh(nll_E, weights_E, loss.num_real)
    phase_E = loss.phase_E[: loss.num_real]
    return torch.stack(
        [weighted_E.masked_fill(phase_E != phase, 0).sum() for phase in range(num_phases)]
    )


def normalize_phases(sums_P: Tensor, tokens: Sequence[int]) -> Tensor:
    """Divide the sums of the phases by their tokens; a phase without tokens stays 0.

    Args:
        sums_P: Weighted sum of each phase.
        tokens: Real tokens of each phase in the global batch.
    """
    # By numbers, because a tensor of them would make the host wait for the GPU.
    parts = zip(sums_P.unbind(), tokens, strict=True)
    return torch.stack([total / max(count, 1) for total, count in parts])


def sum_samples(nll_E: Tensor, loss: LossRows, num_samples: int) -> Tensor:
    """Return float64 `[B]`: each sample's sum with ELBO weights, 0 for samples without loss rows.

    The sum of a sample does not depend on the other samples of the micro-batch.

    Args:
        nll_E: `-log p(target)` of the loss rows in nats, with or without padding.
        loss: The loss rows.
        num_samples: B, the number of samples.
    """
    sums_B = torch.zeros(num_samples, dtype=torch.float64, device=nll_E.device)
    if loss.num_real == 0:
        return sums_B
    weighted_E = _weigh(nll_E.double(), loss.elbo_weights_E.double(), loss.num_real)
    parts = torch.split(weighted_E, list(loss.lengths))
    last_rows = torch.tensor(loss.lengths, device=nll_E.device).cumsum(0) - 1
    samples = loss.sample_E[last_rows]
    # A sample has at most two runs of loss rows, so that the order of the additions has no effect.
    return sums_B.index_add(0, samples, torch.stack([part.sum() for part in parts]))


def estimate_nelbo(
    sums_PN: NDArray[np.float64], phases: Sequence[str], sequence_length: int
) -> NelboEstimate:
    """Estimate the NELBO of a validation set whose samples were evaluated in all phases.

    Args:
        sums_PN: `sum_samples` of each sample in each phase; zero where the sample has no loss rows.
        phases: Names of the phases.
        sequence_length: T, the tokens of a sample.

    Raises:
        ValueError: There are no samples.
    """
    if sums_PN.shape[1] == 0:
        raise ValueError("there are no samples to estimate a NELBO from")
    nelbo_N = sums_PN.sum(axis=0) / sequence_length
    error = float(nelbo_N.std(ddof=1)) / math.sqrt(len(nelbo_N)) if len(nelbo_N) > 1 else math.nan
    return NelboEstimate(
        nelbo=float(nelbo_N.mean()),
        standard_error=error,
        phases={
            name: float(sums_N.mean()) / sequence_length
            for name, sums_N in zip(phases, sums_PN, strict=True)
        },
    )


def mean_by_time(values_N: NDArray[np.float64], t_N: NDArray[np.float64]) -> dict[float, float]:
    """Return the mean value for each tenth of the times with samples, by the tenth's middle.

    Args:
        values_N: A value of each sample.
        t_N: The time of each sample, in [0, 1].
    """
    tenth_N = np.minimum((t_N * NUM_TIME_BINS).astype(np.int64), NUM_TIME_BINS - 1)
    return {
        (tenth + 0.5) / NUM_TIME_BINS: float(values_N[tenth_N == tenth].mean())
        for tenth in np.unique(tenth_N).tolist()
    }


def to_perplexity(nats_per_token: float) -> float:
    """Return exp of a loss in nats per token; infinite beyond float64."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


def _weigh(nll_E: Tensor, weights_E: Tensor, num_real: int) -> Tensor:
    """Return weighted losses without padding, at which 0 * inf could occur."""
    return nll_E[:num_real] * weights_E[:num_real]
