"""Which row of a dataset is sample n of a run: a keyed shuffle of all rows, as a pure function.

Sample n is row `permutation(seed, corpus, epoch)[n % num_rows]` of epoch `n // num_rows`. So each
row comes exactly once per epoch, whatever the number of ranks or the batch size, which may change
on the way, and the whole state of the loader is the number of samples consumed. Nothing is stored.

Several corpora compose: a blend turns sample n into draw k of corpus c, and the row is
`SampleOrder(seed, num_rows_of_c, corpus=c).rows(k)`. A single corpus has number 0 and k = n, so a
blend of one corpus is this order.

The permutation is a Feistel network over [0, a) x [0, b), where a * b is the smallest such
rectangle of nearly equal sides that holds the rows; indices outside the rows walk on along their
cycle (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", methods 2 and 3). Round keys
are raw Philox bits, which numpy guarantees not to change. Another order needs another version.

Shapes: N samples asked for.
"""

import math

import numpy as np
import numpy.typing as npt

ORDER_VERSION = 1

_NUM_ROUNDS = 12
# Second word of the Philox key: "order". Other uses of a run's seed have small numbers there.
_KEY_DOMAIN = 0x6F72646572
# Multipliers of the SplitMix64 finalizer (Steele, Lea, Flood 2014).
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_27, _SHIFT_30, _SHIFT_32 = np.uint64(27), np.uint64(30), np.uint64(32)


class SampleOrder:
    """The order of one corpus.

    Args:
        seed: of the run, in [0, 2^64).
        num_rows: of the corpus at the run's sequence length, in [1, 2^62).
        corpus: number of the corpus in a blend.
    """

    def __init__(self, seed: int, num_rows: int, corpus: int = 0) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"the seed must be in [0, 2^64), not {seed}")
        if not 1 <= num_rows < 2**62:
            raise ValueError(f"an order needs between 1 and 2^62 rows, not {num_rows}")
        if corpus < 0:
            raise ValueError(f"the number of a corpus must not be negative, not {corpus}")
        self._seed = seed
        self._num_rows = num_rows
        self._corpus = corpus

    def rows(self, sample_indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The row numbers of samples.

        Args:
            sample_indices: int64 [N], from 0 upwards without end.

        Returns:
            int64 [N], in [0, num_rows).
        """
        index_N = np.asarray(sample_indices, dtype=np.int64)
        if index_N.size and index_N.min() < 0:
            raise ValueError("sample indices must not be negative")
        epoch_N, place_N = np.divmod(index_N, self._num_rows)
        rows_N = np.empty_like(index_N)
        for epoch in np.unique(epoch_N).tolist():
            of_epoch_N = epoch_N == epoch
            places = place_N[of_epoch_N].astype(np.uint64)
            keys = round_keys(self._seed, _KEY_DOMAIN, epoch, self._corpus)
            rows_N[of_epoch_N] = permute(places, self._num_rows, keys)
        return rows_N


def round_keys(seed: int, domain: int, first: int, second: int) -> npt.NDArray[np.uint64]:
    """The keys of `permute` for the permutation numbered (first, second) of a domain."""
    # Arrays with a type: numpy turns a list that holds an integer from 2^63 up into floats.
    key = np.array([seed, domain], dtype=np.uint64)
    counter = np.array([0, 0, first, second], dtype=np.uint64)
    bits = np.random.Philox(key=key, counter=counter)
    return np.asarray(bits.random_raw(_NUM_ROUNDS), dtype=np.uint64)


def permute(
    values_N: npt.NDArray[np.uint64], size: int, round_keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """Apply the keyed permutation of [0, size) to `values_N`, uint64 [N]."""
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
    """One pass of the Feistel network over [0, height) x [0, width), both sides below 2^32."""
    side_a, side_b = np.uint64(height), np.uint64(width)
    left_N, right_N = np.divmod(values_N, side_b)
    for number, key in enumerate(round_keys):
        # The half that changes alternates; each step adds a function of the other half.
        if number % 2 == 0:
            left_N = _add_modulo(left_N, _scale(_mix(right_N, key), side_a), side_a)
        else:
            right_N = _add_modulo(right_N, _scale(_mix(left_N, key), side_b), side_b)
    result: npt.NDArray[np.uint64] = left_N * side_b + right_N
    return result


def _mix(values_N: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """64 well mixed bits of each value."""
    mixed_N = values_N + key
    mixed_N = (mixed_N ^ (mixed_N >> _SHIFT_30)) * _MIX_1
    return (mixed_N ^ (mixed_N >> _SHIFT_27)) * _MIX_2


def _scale(bits_N: npt.NDArray[np.uint64], size: np.uint64) -> npt.NDArray[np.uint64]:
    """The high 32 bits of each value, scaled to [0, size)."""
    scaled_N: npt.NDArray[np.uint64] = ((bits_N >> _SHIFT_32) * size) >> _SHIFT_32
    return scaled_N


def _add_modulo(
    values_N: npt.NDArray[np.uint64], addends_N: npt.NDArray[np.uint64], size: np.uint64
) -> npt.NDArray[np.uint64]:
    sum_N = values_N + addends_N
    result: npt.NDArray[np.uint64] = sum_N - size * (sum_N >= size)
    return result
