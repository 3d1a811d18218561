"""Times, masks and slot orders: their distributions, and that they depend on (seed, index) only.

Seeds are fixed, so a statistical test has the same result at each run. A correct generator exceeds
its bound with probability 1e-3 at most: five standard deviations, or the named quantile.
"""

import hashlib
from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_eso.batches.dealing import Dealing, PhaseSplit
from megatron_eso.data.samples.lengths import draw_lengths
from megatron_eso.objectives.noise.schedule import LogLinearSchedule
from megatron_eso.objectives.noise.slots import (
    SAMPLING_EPSILON,
    Noise,
    diffusion_times,
    draw_noise,
    validation_times,
)
from megatron_eso.randomness.bits import random_bits, uniform
from megatron_eso.randomness.purposes import NOISE_VERSION, Purpose

SEED = 7
# 99.9 % quantiles: chi-square of 23 degrees of freedom; Kolmogorov-Smirnov times sqrt(n).
CHI_SQUARE_23 = 49.73
KOLMOGOROV_SMIRNOV = 1.95

# Noise version 1 at seed 1234: a change of any of these values needs a new NOISE_VERSION.
PINNED_BITS = [7615372710734572584, 2776061147663605607]
PINNED_TIMES = [
    "0x1.34ad04d30fa8ep-1",
    "0x1.1c98eff54536ap-3",
    "0x1.6a99b135340c9p-2",
    "0x1.b0e6a76e5c728p-1",
]
PINNED_SEQUENTIAL_ORDER = [10, 3, 14, 5, 2, 4, 0, 1, 6, 7, 8, 9, 11, 12, 13, 15]
PINNED_DIFFUSION_ORDER = [15, 10, 3, 13, 2, 9, 14, 4, 12, 11, 6, 1, 5, 0, 8, 7]
PINNED_LENGTHS = [1000, 498, 463, 211, 483, 1000, 717, 481]
PINNED_NOISE = "e6bb7e6022967acd"
PINNED_VALIDATION = "6b332fddca6173f2"


def draw(
    indices: NDArray[np.int64], *, sequential: bool, t: float, alpha_0: float, T: int
) -> Noise:
    return draw_noise(
        SEED,
        indices,
        np.full(len(indices), sequential),
        np.full(len(indices), t),
        LogLinearSchedule(alpha_0),
        T,
    )


def equal(first: Noise, second: Noise) -> bool:
    return (
        np.array_equal(first.length_B, second.length_B)
        and np.array_equal(first.is_masked_BT, second.is_masked_BT)
        and np.array_equal(first.permutation_BT, second.permutation_BT)
        and np.array_equal(first.t_B, second.t_B, equal_nan=True)
        and np.array_equal(first.is_sequential_B, second.is_sequential_B)
    )


def assert_uniform(values: NDArray[np.float64]) -> None:
    ordered = np.sort(values)
    steps = np.arange(len(ordered) + 1) / len(ordered)
    distance = max((ordered - steps[:-1]).max(), (steps[1:] - ordered).max())
    assert distance * np.sqrt(len(ordered)) < KOLMOGOROV_SMIRNOV


def digest(*arrays: NDArray[np.generic]) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


@pytest.mark.parametrize("alpha_0", [1.0, 0.5, 0.125])
@pytest.mark.parametrize("t", [1e-3, 0.1, 0.5, 0.999])
def test_tokens_are_masked_at_the_schedules_rate(alpha_0: float, t: float) -> None:
    num_samples, length = 200, 512
    rate = 1 - alpha_0 * (1 - (1 - 1e-3) * t)
    noise = draw(np.arange(num_samples), sequential=False, t=t, alpha_0=alpha_0, T=length)
    deviation = np.sqrt(rate * (1 - rate) / (num_samples * length))
    assert abs(noise.is_masked_BT.mean() - rate) < 5 * deviation
    # Tokens are independent: counts of samples vary as binomial counts, and their variance by 2/n.
    variance = noise.is_masked_BT.sum(1).var()
    relative = variance / (length * rate * (1 - rate))
    kurtosis = 1 / (length * rate * (1 - rate))
    assert abs(relative - 1) < 5 * np.sqrt((2 + kurtosis) / num_samples)


@pytest.mark.parametrize("alpha_0", [1.0, 0.7, 0.125, 0.0])
def test_the_sequential_phase_masks_at_the_rate_of_its_start(alpha_0: float) -> None:
    noise = draw(np.arange(200), sequential=True, t=0.3, alpha_0=alpha_0, T=512)
    deviation = np.sqrt(alpha_0 * (1 - alpha_0) / noise.is_masked_BT.size)
    assert abs(noise.is_masked_BT.mean() - (1 - alpha_0)) <= 5 * deviation
    assert np.isnan(noise.t_B).all()


@pytest.mark.parametrize("sequential", [False, True])
def test_slots_hold_clean_tokens_first_and_masked_ones_in_the_phases_order(
    sequential: bool,
) -> None:
    noise = draw(np.arange(64), sequential=sequential, t=0.5, alpha_0=0.5, T=33)
    for is_masked, permutation in zip(noise.is_masked_BT, noise.permutation_BT, strict=True):
        assert sorted(permutation) == list(range(33))
        in_slots = is_masked[permutation]
        assert np.array_equal(in_slots, np.sort(in_slots))
        masked, clean = permutation[in_slots], permutation[~in_slots]
        assert (sorted(masked) == masked.tolist()) == (sequential or len(masked) < 2)
        assert sorted(clean) != clean.tolist() or len(clean) < 5


@pytest.mark.parametrize(
    ("sequential", "alpha_0", "t"), [(False, 0.0, 0.5), (False, 1.0, 0.0), (True, 1.0, 0.5)]
)
def test_random_orders_are_uniform(sequential: bool, alpha_0: float, t: float) -> None:
    """Draw orders with all tokens masked in the diffusion phase, and all clean in both phases."""
    num_samples = 24 * 100
    noise = draw(np.arange(num_samples), sequential=sequential, t=t, alpha_0=alpha_0, T=4)
    assert noise.is_masked_BT.all() == (alpha_0 == 0)
    codes = noise.permutation_BT @ 4 ** np.arange(4)
    counts = np.array([(codes == order @ 4 ** np.arange(4)).sum() for order in all_orders()])
    assert counts.sum() == num_samples
    expected = num_samples / 24
    assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE_23


def all_orders() -> NDArray[np.int64]:
    return np.array(list(permutations(range(4))))


def test_the_sequential_order_of_all_masked_tokens_is_left_to_right() -> None:
    noise = draw(np.arange(5), sequential=True, t=0.5, alpha_0=0.0, T=9)
    assert np.array_equal(noise.permutation_BT, np.tile(np.arange(9), (5, 1)))


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.5, 1.0])
def test_the_share_of_samples_that_is_cut_has_uniform_lengths(ratio: float) -> None:
    """Count cut samples and their lengths, 1 .. 24, which are binomial; T is one of the lengths."""
    num_samples, length = 20000, 24
    lengths = draw_lengths(SEED, np.arange(num_samples), ratio, length)
    assert 1 <= lengths.min() <= lengths.max() <= length
    share = ratio * (1 - 1 / length)
    deviation = np.sqrt(share * (1 - share) / num_samples)
    assert abs((lengths < length).mean() - share) <= 5 * deviation
    if ratio == 1.0:
        counts = np.bincount(lengths, minlength=length + 1)[1:]
        expected = num_samples / length
        assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE_23


def test_a_samples_length_depends_on_seed_and_index_alone() -> None:
    lengths = draw_lengths(SEED, np.arange(40), 0.5, 1000)
    assert np.array_equal(lengths[[31, 4]], draw_lengths(SEED, np.array([31, 4]), 0.5, 1000))
    assert not np.array_equal(lengths, draw_lengths(SEED + 1, np.arange(40), 0.5, 1000))
    # A sample that a smaller share cuts has the same length under a larger share.
    few = draw_lengths(SEED, np.arange(40), 0.2, 1000)
    assert np.array_equal(few[few < 1000], lengths[few < 1000])


@pytest.mark.parametrize("sequential", [False, True])
def test_a_cut_sample_has_the_noise_of_the_whole_sample_up_to_its_length(sequential: bool) -> None:
    arguments = (
        SEED,
        np.arange(64),
        np.full(64, sequential),
        np.full(64, 0.5),
        LogLinearSchedule(0.5),
        20,
    )
    whole, lengths = draw_noise(*arguments), 1 + np.arange(64) % 20
    cut = draw_noise(*arguments, length_B=lengths)
    for b, n in enumerate(lengths):
        assert np.array_equal(cut.is_masked_BT[b, :n], whole.is_masked_BT[b, :n])
        assert not cut.is_masked_BT[b, n:].any()
        kept = whole.permutation_BT[b][whole.permutation_BT[b] < n]
        assert cut.permutation_BT[b].tolist() == [*kept.tolist(), *range(n, 20)]


@pytest.mark.parametrize("batch_split", [0.5, 1.0])
def test_each_diffusion_sample_of_a_step_has_a_stratum_of_its_own(batch_split: float) -> None:
    split = PhaseSplit(64, batch_split)
    places = np.arange(64)
    jitter = []
    for step in range(40):
        t = diffusion_times(SEED, 64 * step, split, places)
        assert np.array_equal(np.isnan(t), split.phases(places) == 1)
        t = t[~np.isnan(t)]
        assert t.min() >= SAMPLING_EPSILON
        assert t.max() < 1
        unit = (t - SAMPLING_EPSILON) / (1 - SAMPLING_EPSILON)
        strata = np.floor(unit * len(t))
        assert sorted(strata) == list(range(len(t)))
        jitter.append(unit * len(t) - strata)
    assert_uniform(np.concatenate(jitter))


def test_no_place_always_has_low_or_high_times() -> None:
    split, num_steps = PhaseSplit(16, 0.5), 400
    times = np.stack(
        [diffusion_times(SEED, 16 * s, split, np.arange(16)) for s in range(num_steps)]
    )
    for place in np.flatnonzero(split.phases(np.arange(16)) == 0):
        assert_uniform((times[:, place] - SAMPLING_EPSILON) / (1 - SAMPLING_EPSILON))


def test_validation_times_are_stratified_over_the_set() -> None:
    t = validation_times(SEED, np.arange(100), 100)
    unit = (t - SAMPLING_EPSILON) / (1 - SAMPLING_EPSILON)
    assert sorted(np.floor(unit * 100)) == list(range(100))
    assert np.array_equal(t[[17, 3]], validation_times(SEED, np.array([17, 3]), 100))
    assert not np.array_equal(t, np.sort(t))


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (4, 1), (1, 4), (2, 4), (4, 4), (16, 2)])
def test_noise_depends_on_neither_micro_batch_nor_rank(layout: tuple[int, int]) -> None:
    # The noise of the whole step.
    first_index, schedule, length = 320, LogLinearSchedule(0.3), 20
    places = np.arange(32)
    split = PhaseSplit(32, 0.5)
    expected = draw_noise(
        SEED,
        first_index + places,
        split.phases(places) == 1,
        diffusion_times(SEED, first_index, split, places),
        schedule,
        length,
    )
    # Each micro-batch of each rank has its part of it.
    dealing = Dealing(32, *layout, 0.5)
    for rank in range(dealing.data_parallel_size):
        for some in dealing.micro_batches(rank):
            noise = draw_noise(
                SEED,
                first_index + some,
                split.phases(some) == 1,
                diffusion_times(SEED, first_index, split, some),
                schedule,
                length,
            )
            assert equal(
                noise,
                Noise(
                    length_B=expected.length_B[some],
                    is_masked_BT=expected.is_masked_BT[some],
                    permutation_BT=expected.permutation_BT[some],
                    t_B=expected.t_B[some],
                    is_sequential_B=expected.is_sequential_B[some],
                ),
            )


def test_seeds_samples_purposes_and_phases_have_noise_of_their_own() -> None:
    drawn = {
        (seed, purpose, index): tuple(random_bits(seed, purpose, index, 4).tolist())
        for seed in (0, 1, 2**64 - 1)
        for purpose in Purpose
        for index in (0, 1, 2**32, 2**63)
    }
    words = [word for four in drawn.values() for word in four]
    assert len(set(words)) == len(words)
    arguments = (np.array([5]), np.array([False]), np.array([0.5]), LogLinearSchedule(0.5), 64)
    masks = [
        draw_noise(SEED, *arguments).is_masked_BT,
        draw_noise(SEED, *arguments, is_validation=True).is_masked_BT,
        draw_noise(SEED + 1, *arguments).is_masked_BT,
        draw(np.array([6]), sequential=False, t=0.5, alpha_0=0.5, T=64).is_masked_BT,
        draw(np.array([5]), sequential=True, t=0.5, alpha_0=0.5, T=64).is_masked_BT,
    ]
    assert len({mask.tobytes() for mask in masks}) == len(masks)


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    assert np.array_equal(
        random_bits(SEED, Purpose.TIME, 9, 7), random_bits(SEED, Purpose.TIME, 9, 1000)[:7]
    )


def test_uniform_values_are_uniform_and_below_one() -> None:
    values = uniform(SEED, Purpose.DIFFUSION_MASK, 0, 20000)
    assert_uniform(values)
    assert values.max() <= 1 - 2.0**-53


def test_the_weight_is_the_schedules_derivative_over_its_mask_rate() -> None:
    schedule, t, h = LogLinearSchedule(0.25), np.linspace(0.1, 0.9, 9), 1e-6
    slope = (schedule.alpha(t + h) - schedule.alpha(t - h)) / (2 * h)
    np.testing.assert_allclose(schedule.elbo_weight(t), -slope / (1 - schedule.alpha(t)), rtol=1e-8)
    np.testing.assert_allclose(LogLinearSchedule(1.0).elbo_weight(t), 1 / t, rtol=1e-12)
    assert not LogLinearSchedule(0.0).elbo_weight(t).any()


def philox(key: tuple[int, int], counter: list[int]) -> list[int]:
    """Compute a block of Philox-4x64-10, as in its paper (Salmon et al., SC 2011)."""
    word, (a, b), (w, x, y, z) = 2**64, key, counter
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * w, 0xCA5A826395121157 * y
        w, x, y, z = (second // word) ^ x ^ a, second % word, (first // word) ^ z ^ b, first % word
        a, b = (a + 0x9E3779B97F4A7C15) % word, (b + 0xBB67AE8584CAA73B) % word
    return [w, x, y, z]


def test_random_bits_are_blocks_of_philox() -> None:
    for seed, purpose, index in [(0, Purpose.TIME, 0), (2**64 - 1, Purpose.DROPOUT, 2**63 + 5)]:
        key = (seed, int(purpose))
        blocks = [philox(key, [number, 0, index, 0]) for number in (1, 2, 3)]
        assert random_bits(seed, purpose, index, 12).tolist() == sum(blocks, [])


def test_noise_version_1_does_not_change() -> None:
    assert NOISE_VERSION == 1
    assert sorted(Purpose)[:15] == list(range(1, 16))
    assert random_bits(1234, Purpose.TIME, 5, 2).tolist() == PINNED_BITS
    dealing, places = Dealing(8, 2, 2, 0.5), np.arange(8)
    t = diffusion_times(1234, 80, dealing.split, places)
    assert [float(x).hex() for x in t[~np.isnan(t)]] == PINNED_TIMES
    assert draw_lengths(1234, 80 + places, 0.5, 1000).tolist() == PINNED_LENGTHS
    schedule = LogLinearSchedule(0.25)
    noise = draw_noise(1234, 80 + places, dealing.split.phases(places) == 1, t, schedule, 16)
    assert noise.permutation_BT[0].tolist() == PINNED_SEQUENTIAL_ORDER
    assert noise.permutation_BT[1].tolist() == PINNED_DIFFUSION_ORDER
    assert digest(noise.is_masked_BT, noise.permutation_BT) == PINNED_NOISE
    t = validation_times(1234, places, 8)
    validation = draw_noise(1234, places, places % 2 == 0, t, schedule, 16, is_validation=True)
    arrays = (validation.is_masked_BT, validation.permutation_BT, t)
    assert digest(*arrays) == PINNED_VALIDATION
    assert dealing.micro_batches(1)[0].tolist() == [3, 2]
