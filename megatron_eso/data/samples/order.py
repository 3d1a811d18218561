"""The data row of sample n of a run: a keyed shuffle of all data rows, as a pure function.

Sample n is the data row `permutation(seed, corpus, epoch)[n % num_rows]` of epoch `n // num_rows`.
Each data row therefore comes exactly once in an epoch. The number of ranks and the batch size may
change during the run. The whole state of the loader is the number of samples consumed.

With several corpora, a blend turns sample n into draw k of corpus c, and the data row is
`SampleOrder(seed, num_rows_of_c, corpus=c).rows(k)`. A single corpus has number 0 and k = n, so a
blend of one corpus has this order.

The permutation is that of `randomness/permutation.py`. Another order needs another version.

Shapes: N samples.
"""

import numpy as np
import numpy.typing as npt

from megatron_eso.randomness.permutation import permute, round_keys
from megatron_eso.randomness.purposes import Purpose

ORDER_VERSION = 1


class SampleOrder:
    """The order of one corpus.

    Args:
        seed: Seed of the run, in [0, 2^64).
        num_rows: Data rows of the corpus at the run's sequence length, in [1, 2^62).
        corpus: Number of the corpus in a blend.

    Raises:
        ValueError: An argument is out of range.
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
        """Return the data rows of samples.

        Args:
            sample_indices: Sample numbers, int64 [N], from 0 on, without an upper limit.

        Returns:
            Numbers of data rows, int64 [N], in [0, num_rows).

        Raises:
            ValueError: A sample number is negative.
        """
        index_N = np.asarray(sample_indices, dtype=np.int64)
        if index_N.size and index_N.min() < 0:
            raise ValueError("sample indices must not be negative")
        epoch_N, number_N = np.divmod(index_N, self._num_rows)
        rows_N = np.empty_like(index_N)
        for epoch in np.unique(epoch_N).tolist():
            of_epoch_N = epoch_N == epoch
            numbers = number_N[of_epoch_N].astype(np.uint64)
            keys = round_keys(self._seed, Purpose.SAMPLE_ORDER, epoch, self._corpus)
            rows_N[of_epoch_N] = permute(numbers, self._num_rows, keys)
        return rows_N
