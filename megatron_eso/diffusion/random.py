"""Randomness as a function of (seed, purpose, index).

It is counter-based: the same on every rank, machine and layout, in any order of drawing. Raw
Philox-4x64 blocks are used and nothing of numpy's distributions, since only the former are
promised to stay as they are from one numpy release to the next.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

# Changes when any drawn value changes, here or in noise.py.
NOISE_VERSION = 1


class Purpose(IntEnum):
    """What a stream of random bits is for: one key of the generator each.

    The values are part of the noise version.
    """

    TIME = 1
    STRATUM = 2
    DIFFUSION_MASK = 3
    DIFFUSION_ORDER = 4
    SEQUENTIAL_MASK = 5
    SEQUENTIAL_ORDER = 6
    VALIDATION_TIME = 7
    VALIDATION_STRATUM = 8
    VALIDATION_DIFFUSION_MASK = 9
    VALIDATION_DIFFUSION_ORDER = 10
    VALIDATION_SEQUENTIAL_MASK = 11
    VALIDATION_SEQUENTIAL_ORDER = 12
    DROPOUT = 13
    ANY_ORDER = 14
    LENGTH = 15


def random_bits(seed: int, purpose: Purpose, index: int, count: int) -> NDArray[np.uint64]:
    """Draws 64-bit words.

    Args:
        seed: The run's seed, in [0, 2**64).
        purpose: What the words are for.
        index: Global index of the sample (or of the step's first sample), in [0, 2**64).
        count: Number of words; a longer draw begins with the shorter one.

    Returns:
        uint64 `[count]`.
    """
    generator = np.random.Philox(
        key=np.array([seed, purpose], dtype=np.uint64),
        counter=np.array([0, 0, index, 0], dtype=np.uint64),
    )
    words: NDArray[np.uint64] = generator.random_raw(count)
    return words


def uniform(seed: int, purpose: Purpose, index: int, count: int) -> NDArray[np.float64]:
    """Draws float64 `[count]` in [0, 1): the upper 53 bits of each word of `random_bits`."""
    upper_bits = random_bits(seed, purpose, index, count) >> np.uint64(11)
    return upper_bits.astype(np.float64) * 2.0**-53
