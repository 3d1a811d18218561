"""Keyed permutations of [0, size) as pure functions, without stored tables.

A permutation is a Feistel network over [0, a) x [0, b), where a * b is the smallest rectangle of
nearly equal sides that contains the range. A value outside the range is permuted again until it is
inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", methods 2 and 3).
Round keys are raw Philox bits, which numpy guarantees not to change.

Shapes: N values.
"""

import math

import numpy as np
import numpy.typing as npt

from .bits import random_bits
from .purposes import Purpose

_NUM_ROUNDS = 12
# Multipliers of the SplitMix64 finalizer (Steele, Lea, Flood 2014).
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_27, _SHIFT_30, _SHIFT_32 = np.uint64(27), np.uint64(30), np.uint64(32)


def round_keys(seed: int, purpose: Purpose, first: int, second: int = 0) -> npt.NDArray[np.uint64]:
    """Return the keys of `permute` for the permutation numbered (first, second) of a purpose.

    Args:
        seed: The seed of the run or the dataset.
        purpose: The use of the permutation.
        first: First number of the permutation, such as the epoch.
        second: Second number, such as the corpus.
    """
    return random_bits(seed, purpose, first, _NUM_ROUNDS, second)


def permute(
    values_N: npt.NDArray[np.uint64], size: int, round_keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """Apply the keyed permutation of [0, size) to values.

    Args:
        values_N: uint64 [N], each below `size`.
        size: Size of the range, at least 1.
        round_keys: The output of the function `round_keys`.

    Returns:
        int64 [N], the images of the values.
    """
    width = math.isqrt(size - 1) + 1  # ceil(sqrt(size)), and 1 for size 1
    height = -(-size // width)
    values_N = _encipher(values_N, width, height, round_keys)
    outside = np.flatnonzero(values_N >= size)
    while outside.size:
        walked = _encipher(values_N[outside], width, height, round_keys)
        values_N[outside] = walked
        outside = outside[walked >= size]
    return values_N.astype(np.int64)


def _encipher(
    values_N: npt.NDArray[np.uint64],
    width: int,
    height: int,
    round_keys: npt.NDArray[np.uint64],
) -> npt.NDArray[np.uint64]:
    """Apply the Feistel network over [0, height) x [0, width) once; both sides are below 2^32."""
    side_a, side_b = np.uint64(height), np.uint64(width)
    left_N, right_N = np.divmod(values_N, side_b)
    for number, key in enumerate(round_keys):
        # The two halves alternate; each round adds a function of the other half to one of them.
        if number % 2 == 0:
            left_N = _add_modulo(left_N, _scale(_mix(right_N, key), side_a), side_a)
        else:
            right_N = _add_modulo(right_N, _scale(_mix(left_N, key), side_b), side_b)
    result: npt.NDArray[np.uint64] = left_N * side_b + right_N
    return result


def _mix(values_N: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """Return 64 well mixed bits for each value."""
    mixed_N = values_N + key
    mixed_N = (mixed_N ^ (mixed_N >> _SHIFT_30)) * _MIX_1
    return (mixed_N ^ (mixed_N >> _SHIFT_27)) * _MIX_2


def _scale(bits_N: npt.NDArray[np.uint64], size: np.uint64) -> npt.NDArray[np.uint64]:
    """Return the high 32 bits of each value, scaled to [0, size)."""
    scaled_N: npt.NDArray[np.uint64] = ((bits_N >> _SHIFT_32) * size) >> _SHIFT_32
    return scaled_N


def _add_modulo(
    values_N: npt.NDArray[np.uint64], addends_N: npt.NDArray[np.uint64], size: np.uint64
) -> npt.NDArray[np.uint64]:
    sum_N = values_N + addends_N
    result: npt.NDArray[np.uint64] = sum_N - size * (sum_N >= size)
    return result
