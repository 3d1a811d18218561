"""What training takes of the data: tokens by sample number."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_eso.config.sections import Vocabulary


class SampleSource(Protocol):
    """Samples by number. Reading is safe from several threads.

    Shapes: B samples, T tokens of a sample.
    """

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids that may occur, and the mask token, which never does."""
        ...

    def samples(self, indices_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read samples, framed as `data.framing` says.

        Args:
            indices_B: Sample numbers from 0, int64 `[B]`.

        Returns:
            Token ids, int64 `[B, T]`, T = `data.sequence_length`.

        Raises:
            DataError: A shard is damaged; the message names shard, record, offset, row and sample.
        """
        ...
