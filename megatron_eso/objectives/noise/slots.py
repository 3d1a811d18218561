"""Times, masks and slot orders, each a function of (seed, global index of the sample).

Shapes: B samples, T positions or slots, N samples of a validation set.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_eso.batches.dealing import PhaseSplit
from megatron_eso.objectives.noise.orders import (
    OrderLaw,
    sort_slots,
    uniform_keys,
)
from megatron_eso.objectives.noise.schedule import LogLinearSchedule
from megatron_eso.randomness.bits import random_bits, uniform
from megatron_eso.randomness.purposes import Purpose

SAMPLING_EPSILON = 1e-3
LEFT_TO_RIGHT = OrderLaw(name="left_to_right")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Noise:
    """Times, masks and slot orders of the samples of a micro-batch.

    Attributes:
        length_B: int64, real tokens of each sample; positions and slots beyond do not exist.
        is_masked_BT: Masked tokens in natural order; false beyond the length.
        permutation_BT: int64, `permutation[b, slot] = position`: clean tokens, then masked ones,
            then the positions beyond the length.
        t_B: Times of the diffusion samples; nan for sequential ones.
        is_sequential_B: Samples of the sequential phase.
    """

    length_B: NDArray[np.int64]
    is_masked_BT: NDArray[np.bool_]
    permutation_BT: NDArray[np.int64]
    t_B: NDArray[np.float64]
    is_sequential_B: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Purposes:
    """The random streams of training, or those of validation."""

    time: Purpose
    stratum: Purpose
    masks: tuple[Purpose, Purpose]  # diffusion, sequential
    orders: tuple[Purpose, Purpose]


_TRAINING = _Purposes(
    Purpose.TIME,
    Purpose.STRATUM,
    (Purpose.DIFFUSION_MASK, Purpose.SEQUENTIAL_MASK),
    (Purpose.DIFFUSION_ORDER, Purpose.SEQUENTIAL_ORDER),
)
_VALIDATION = _Purposes(
    Purpose.VALIDATION_TIME,
    Purpose.VALIDATION_STRATUM,
    (Purpose.VALIDATION_DIFFUSION_MASK, Purpose.VALIDATION_SEQUENTIAL_MASK),
    (Purpose.VALIDATION_DIFFUSION_ORDER, Purpose.VALIDATION_SEQUENTIAL_ORDER),
)


def diffusion_times(
    seed: int,
    first_index: int,
    split: PhaseSplit,
    places: NDArray[np.int64],
    *,
    sampling_eps: float = SAMPLING_EPSILON,
) -> NDArray[np.float64]:
    """Draw the times of a step's samples, stratified over all its diffusion samples.

    A step with n diffusion samples has n strata, one for each sample:
    `t = (1 - eps) (u + stratum) / n + eps`, where u is drawn for the sample. A permutation, drawn
    for the step, deals the strata, so no rank or micro-batch always has low times. The reference
    deals them in order (algo.py, `_sample_t`).

    Args:
        seed: The run's seed.
        first_index: Global index of the step's first sample.
        split: The phase of each place; diffusion is phase 0.
        places: int64 `[B]`, places of the samples in the step.
        sampling_eps: Lowest time.

    Returns:
        float64 `[B]` in [sampling_eps, 1); nan at places of the sequential phase.
    """
    # Deal the strata to the step's diffusion samples, then draw a time in each.
    num_strata = split.num_first
    strata = np.argsort(random_bits(seed, Purpose.STRATUM, first_index, num_strata), kind="stable")
    t_B = np.full(len(places), np.nan)
    for b in np.flatnonzero(split.phases(places) == 0):
        stratum = int(strata[split.numbers_in_first(places[b])])
        t_B[b] = _stratified_time(
            seed, _TRAINING, first_index + int(places[b]), stratum, num_strata, sampling_eps
        )
    return t_B


def validation_times(
    seed: int,
    indices: NDArray[np.int64],
    num_samples: int,
    *,
    sampling_eps: float = SAMPLING_EPSILON,
) -> NDArray[np.float64]:
    """Draw the times of validation samples, stratified over the `num_samples` samples of the set.

    Args:
        seed: The run's seed.
        indices: int64 `[B]`, indices of the samples in `0 .. num_samples - 1`.
        num_samples: N, the number of samples that are validated.
        sampling_eps: Lowest time.

    Returns:
        float64 `[B]` in [sampling_eps, 1).
    """
    strata = _deal_validation_strata(seed, num_samples)
    return np.array(
        [
            _stratified_time(
                seed, _VALIDATION, int(index), int(strata[index]), num_samples, sampling_eps
            )
            for index in indices
        ],
        dtype=np.float64,
    )


def draw_noise(  # noqa: PLR0913 - all that the noise depends on
    seed: int,
    indices_B: NDArray[np.int64],
    is_sequential_B: NDArray[np.bool_],
    t_B: NDArray[np.float64],
    schedule: LogLinearSchedule,
    sequence_length: int,
    *,
    length_B: NDArray[np.int64] | None = None,
    is_validation: bool = False,
    order: OrderLaw = LEFT_TO_RIGHT,
) -> Noise:
    """Draw masks and slot orders for given times, and return them as noise.

    A token is masked with probability 1 - alpha_t in a diffusion sample and 1 - alpha_0 in a
    sequential one. Slots hold the clean tokens in random order, then the masked ones, in random
    order for diffusion and in the given order for the sequential phase. A shorter sample has the
    masks and the order of the whole sample, without the positions beyond its length.

    Args:
        seed: The run's seed.
        indices_B: Global indices of the samples; in validation, their indices in the set.
        is_sequential_B: Samples of the sequential phase.
        t_B: Times of the samples; ignored for sequential ones.
        schedule: The noise schedule.
        sequence_length: T, the tokens of a whole sample.
        length_B: Real tokens of the samples; None: T for each.
        is_validation: Whether to draw from the streams of validation, which training never uses.
        order: Order of the masked tokens in the sequential phase.
    """
    purposes = _VALIDATION if is_validation else _TRAINING
    is_sequential_B = np.asarray(is_sequential_B, dtype=np.bool_)
    t_B = np.where(is_sequential_B, np.nan, t_B)
    shape = (len(indices_B), sequence_length)
    if length_B is None:
        length_B = np.full(len(indices_B), sequence_length)
    # Draw each sample's words from two streams of its phase: for the masks and for the order.
    uniform_BT, bits_BT = np.empty(shape), np.empty(shape, dtype=np.uint64)
    for b, index in enumerate(indices_B):
        phase = int(is_sequential_B[b])
        uniform_BT[b] = uniform(seed, purposes.masks[phase], int(index), sequence_length)
        bits_BT[b] = random_bits(seed, purposes.orders[phase], int(index), sequence_length)
    # Mask with the phase's probability, then sort the slots.
    clean_share_B = np.where(is_sequential_B, schedule.alpha_0, schedule.alpha(t_B))
    is_real_BT = np.arange(sequence_length) < length_B[:, None]
    is_masked_BT = is_real_BT & (uniform_BT < 1.0 - clean_share_B[:, None])
    keys_BT = uniform_keys(bits_BT)
    permutation_BT = sort_slots(
        is_real_BT,
        is_masked_BT,
        clean_keys_BT=keys_BT,
        masked_keys_BT=np.where(is_sequential_B[:, None], order.keys(bits_BT), keys_BT),
    )
    return Noise(
        length_B=length_B,
        is_masked_BT=is_masked_BT,
        permutation_BT=permutation_BT,
        t_B=t_B,
        is_sequential_B=is_sequential_B,
    )


def draw_any_order(
    seed: int,
    indices_B: NDArray[np.int64],
    number: int,
    alpha_0: float,
    sequence_length: int,
    *,
    order: OrderLaw = LEFT_TO_RIGHT,
) -> Noise:
    """Draw the `number`-th order of each sample for its exact likelihood; mask every token.

    As in the sequential phase, a random set of positions comes first, in random order, and the
    others follow in the given order. The size of the set is binomial with mean alpha_0 T (the
    reference's algo.py, `_any_order_ar_loss`).

    Args:
        seed: Key of the orders.
        indices_B: Indices of the samples in the set.
        number: Which of a sample's independent orders, from 0 on.
        alpha_0: Expected share of tokens that come first, in random order.
        sequence_length: T, the tokens of a sample.
        order: Order of the others.

    Returns:
        The orders, with every token masked.
    """
    shape = (len(indices_B), sequence_length)
    permutation_BT = np.empty(shape, dtype=np.int64)
    for b, index in enumerate(indices_B):
        # A set has far fewer than 2^40 samples, so no two orders draw from the same words.
        words = random_bits(
            seed, Purpose.ANY_ORDER, int(index) + (number << 40), 2 * sequence_length
        )
        # The first half of the words chooses the set, the second half its order.
        bits_T, order_T = words.reshape(2, sequence_length)
        is_rest_T = (bits_T >> np.uint64(11)) * 2.0**-53 >= alpha_0
        permutation_BT[b] = sort_slots(
            np.ones_like(is_rest_T),
            is_rest_T,
            clean_keys_BT=uniform_keys(order_T),
            masked_keys_BT=order.keys(order_T),
        )
    return Noise(
        length_B=np.full(len(indices_B), sequence_length),
        is_masked_BT=np.ones(shape, dtype=np.bool_),
        permutation_BT=permutation_BT,
        t_B=np.full(len(indices_B), np.nan),
        is_sequential_B=np.ones(len(indices_B), dtype=np.bool_),
    )


@lru_cache(maxsize=1)
def _deal_validation_strata(seed: int, num_samples: int) -> NDArray[np.int64]:
    """Deal a stratum of times to each sample of a validation set; kept for its micro-batches."""
    bits_N = random_bits(seed, Purpose.VALIDATION_STRATUM, 0, num_samples)
    return np.argsort(bits_N, kind="stable")


def _stratified_time(
    seed: int, purposes: _Purposes, index: int, stratum: int, num_strata: int, sampling_eps: float
) -> float:
    u = float(uniform(seed, purposes.time, index, 1)[0])
    return (1.0 - sampling_eps) * ((u + stratum) / num_strata) + sampling_eps
