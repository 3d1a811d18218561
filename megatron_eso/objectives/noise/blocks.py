"""Times and masks of block diffusion, each a function of (seed, global index of the sample).

Shapes: B samples, T positions, K blocks of a whole sample, M = 0 .. block size.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_eso.randomness.bits import random_bits, uniform
from megatron_eso.randomness.purposes import Purpose

# The reference does not draw again for a lower end of 1e-3.
NO_BOUND = 1e-3
NUM_TIMES = 1024
"""Times over which the probability of a number of masks is averaged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """The interval of the times of blocks.

    Attributes:
        low: Lowest time.
        high: Highest time.
        redraws: Whether masks are drawn again until their share lies in the interval.
    """

    low: float
    high: float
    redraws: bool

    def allows(self, share: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return whether masked shares of blocks are kept; an interval's open end allows all."""
        if not self.redraws:
            return np.ones_like(share, dtype=np.bool_)
        return ((share >= self.low) | (self.low <= NO_BOUND)) & (share <= self.high)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockNoise:
    """Times and masks of the samples of a micro-batch.

    Attributes:
        is_masked_BT: Masked tokens in natural order.
        t_BT: Time of each token's block.
    """

    is_masked_BT: NDArray[np.bool_]
    t_BT: NDArray[np.float64]


def draw_blocks(  # noqa: PLR0913 - all that the noise depends on
    seed: int,
    indices_B: NDArray[np.int64],
    places_B: NDArray[np.int64],
    *,
    num_samples: int,
    stratum_index: int,
    starts_BT: NDArray[np.int64],
    block_size: int,
    clip: Clip,
    is_validation: bool = False,
) -> BlockNoise:
    """Draw times, stratified over all blocks of `num_samples` samples, and masks.

    Args:
        seed: The run's seed.
        indices_B: Global indices of the samples; in validation, their indices in the set.
        places_B: Places of the samples among the `num_samples`.
        num_samples: Samples over whose blocks times are stratified.
        stratum_index: Index of the permutation that deals the strata.
        starts_BT: Position at which each token's block starts.
        block_size: Tokens of a block.
        clip: The interval of the times.
        is_validation: Whether to draw from the streams of validation, which training never uses.
    """
    stratum, time, mask = Purpose.STRATUM, Purpose.TIME, Purpose.DIFFUSION_MASK
    if is_validation:
        stratum, time = Purpose.VALIDATION_STRATUM, Purpose.VALIDATION_TIME
        mask = Purpose.VALIDATION_DIFFUSION_MASK
    # Deal the strata of the step to its blocks, then draw a time in each.
    length = starts_BT.shape[1]
    num_blocks = -(-length // block_size)
    num_strata = num_samples * num_blocks
    strata = np.argsort(random_bits(seed, stratum, stratum_index, num_strata), kind="stable")
    t_BT, is_masked_BT = np.empty(starts_BT.shape), np.empty(starts_BT.shape, dtype=np.bool_)
    for b, (index, place) in enumerate(zip(indices_B.tolist(), places_B.tolist(), strict=True)):
        starts_T = starts_BT[b]
        stratum_T = strata[place * num_blocks + starts_T // block_size]
        u_T = uniform(seed, time, index, length)[starts_T]
        t_BT[b] = clip.low + (clip.high - clip.low) * (u_T + stratum_T) / num_strata
        is_masked_BT[b] = _draw_masks(seed, mask, index, t_BT[b], starts_T, block_size, clip)
    return BlockNoise(is_masked_BT=is_masked_BT, t_BT=t_BT)


def measure_masks(block_size: int, clip: Clip) -> tuple[float, float]:
    """Return the probability that a whole block has no mask, and its mean share of masks."""
    times = clip.low + (clip.high - clip.low) * (np.arange(NUM_TIMES) + 0.5) / NUM_TIMES
    if not clip.redraws:
        return float(((1 - times) ** block_size).mean()), float(times.mean())
    # The binomial distribution of each time, restricted to the numbers of masks that are kept.
    number_M = np.arange(block_size + 1)
    log_ratio = np.log(block_size - number_M[:-1]) - np.log(number_M[1:])
    log_choose_M = np.concatenate([[0.0], np.cumsum(log_ratio)])
    times = np.clip(times, 1e-12, 1 - 1e-12)[:, None]
    log_p = log_choose_M + number_M * np.log(times) + (block_size - number_M) * np.log1p(-times)
    log_p = np.where(clip.allows(number_M / block_size), log_p, -np.inf)
    chances = np.exp(log_p - log_p.max(axis=1, keepdims=True))
    probability_M = (chances / chances.sum(axis=1, keepdims=True)).mean(axis=0)
    return float(probability_M[0]), float(probability_M @ number_M) / block_size


def _draw_masks(
    seed: int,
    purpose: Purpose,
    index: int,
    t_T: NDArray[np.float64],
    starts_T: NDArray[np.int64],
    block_size: int,
    clip: Clip,
) -> NDArray[np.bool_]:
    """Draw the masks of a sample; draw those of whole blocks again that the clip does not allow."""
    is_masked_T = np.zeros(len(t_T), dtype=np.bool_)
    is_wrong_T = np.ones(len(t_T), dtype=np.bool_)
    _, block_T, size_K = np.unique(starts_T, return_inverse=True, return_counts=True)
    attempt = 0
    while is_wrong_T.any():
        u_T = uniform(seed, purpose, index, len(t_T), attempt)
        is_masked_T = np.where(is_wrong_T, u_T < t_T, is_masked_T)
        share_K = np.bincount(block_T, weights=is_masked_T, minlength=len(size_K)) / size_K
        is_wrong_T = (~clip.allows(share_K) & (size_K == block_size))[block_T]
        attempt += 1
    return is_masked_T
