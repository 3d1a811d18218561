"""The number of real tokens of a training sample, as a function of (seed, index).

Shapes: N samples.
"""

import numpy as np
from numpy.typing import NDArray

from megatron_eso.randomness.bits import uniform
from megatron_eso.randomness.purposes import Purpose


def draw_lengths(
    seed: int, indices_N: NDArray[np.int64], ssl_ratio: float, sequence_length: int
) -> NDArray[np.int64]:
    """Draw the numbers of real tokens of training samples, of which some are cut at random.

    A sample is cut with probability `ssl_ratio`, to a length uniform in 1 .. T. (The reference of
    arXiv 2602.15014 draws once for a whole micro-batch of a rank, so its cuts depend on the
    layout.)

    Args:
        seed: The run's seed.
        indices_N: Global indices of the samples.
        ssl_ratio: Share of samples that are cut, in [0, 1].
        sequence_length: T.

    Returns:
        int64 `[N]` in 1 .. T.
    """
    length_N = np.full(len(indices_N), sequence_length)
    if ssl_ratio > 0:
        for number, index in enumerate(indices_N):
            choice, share = uniform(seed, Purpose.LENGTH, int(index), 2)
            if choice < ssl_ratio:
                length_N[number] = 1 + int(share * sequence_length)
    return length_N
