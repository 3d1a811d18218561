"""Randomness as a function of (seed, purpose, index).

A counter-based generator gives the same words on every rank, machine and layout, in any order of
draws. The words are raw Philox-4x64 output: numpy guarantees that it does not change between
releases, which it does not guarantee for its distributions.
"""

import numpy as np
from numpy.typing import NDArray

from .purposes import Purpose


def random_bits(
    seed: int,
    purpose: Purpose,
    index: int,
    count: int,
    second_index: int = 0,
    *,
    first: int = 0,
) -> NDArray[np.uint64]:
    """Draw 64-bit words.

    Args:
        seed: The run's seed, in [0, 2**64).
        purpose: The use of the words.
        index: Global index of the sample (or of the step's first sample), in [0, 2**64).
        count: Number of words; a longer draw begins with the shorter one.
        second_index: Second number, for purposes whose draws have two, such as row and slot.
        first: Number of the first word to return; the ones before it are not drawn.

    Returns:
        uint64 `[count]`.
    """
    # One count of the generator gives four words.
    counter, skipped = divmod(first, 4)
    # Typed arrays, because numpy converts a list with an integer of 2^63 or more to floats.
    generator = np.random.Philox(
        key=np.array([seed, purpose], dtype=np.uint64),
        counter=np.array([counter, 0, index, second_index], dtype=np.uint64),
    )
    words: NDArray[np.uint64] = generator.random_raw(skipped + count)
    return words[skipped:]


def uniform(
    seed: int, purpose: Purpose, index: int, count: int, second_index: int = 0
) -> NDArray[np.float64]:
    """Draw float64 `[count]` in [0, 1): the upper 53 bits of each word of `random_bits`.

    Args:
        seed: As in `random_bits`.
        purpose: The use of the numbers.
        index: As in `random_bits`.
        count: Number of numbers.
        second_index: As in `random_bits`.
    """
    upper_bits = random_bits(seed, purpose, index, count, second_index) >> np.uint64(11)
    return upper_bits.astype(np.float64) * 2.0**-53
