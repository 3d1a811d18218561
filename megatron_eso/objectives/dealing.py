"""Which phase, rank and micro-batch each sample of a global batch belongs to.

A *place* is a sample's index minus the first index of its step, in `0 .. global_batch_size - 1`.
Its phase depends on the place, the global batch size and the share of diffusion samples only, so
that another layout trains on the same samples in the same phases.
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from megatron_eso.config.divisibility import as_share, check_dealing


def _steps_up(numbers: NDArray[np.int64], share: int, whole: int) -> NDArray[np.bool_]:
    """Marks `share` of every `whole` consecutive numbers, spread evenly (Bresenham's line)."""
    return (numbers + 1) * share // whole > numbers * share // whole


@dataclass(frozen=True, slots=True)
class Dealing:
    """Deals the places of a global batch to phases, data-parallel ranks and micro-batches.

    Where `micro_batch_size * batch_split` is an integer, every micro-batch holds the same mix of
    both phases. Else a micro-batch holds one phase, and the two kinds alternate evenly, in the same
    order on every rank.

    Attributes:
        global_batch_size: Samples of a step.
        micro_batch_size: Samples of a micro-batch.
        data_parallel_size: Number of data-parallel ranks.
        batch_split: Share of the samples that go through the diffusion phase, in [0, 1].

    Raises:
        ConfigError: The phases cannot be dealt evenly; the message names sizes that can.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int
    batch_split: float

    def __post_init__(self) -> None:
        """Refuses sizes that do not deal both phases evenly."""
        check_dealing(
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            data_parallel_size=self.data_parallel_size,
            batch_split=self.batch_split,
        )

    @property
    def num_diffusion_samples(self) -> int:
        """Samples of a step that go through the diffusion phase."""
        return int(self._share * self.global_batch_size)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step, on each rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def is_sequential(self, places: npt.ArrayLike) -> NDArray[np.bool_]:
        """Tells the places of the sequential phase; takes one place or an array of any shape."""
        places = np.asarray(places, dtype=np.int64)
        return ~_steps_up(places, self.num_diffusion_samples, self.global_batch_size)

    def diffusion_ranks(self, places: npt.ArrayLike) -> NDArray[np.int64]:
        """Numbers the diffusion places from 0 on; meaningless at sequential places."""
        places = np.asarray(places, dtype=np.int64)
        return places * self.num_diffusion_samples // self.global_batch_size

    def micro_batches(self, data_parallel_rank: int) -> list[NDArray[np.int64]]:
        """Returns the places of each micro-batch of one rank, diffusion places first.

        Over all ranks each place comes exactly once. The list has the same length, and its
        micro-batches the same number of samples of either phase, on every rank.
        """
        if not 0 <= data_parallel_rank < self.data_parallel_size:
            raise ValueError(
                f"data_parallel_rank {data_parallel_rank} is not in [0, {self.data_parallel_size})"
            )
        places = np.arange(self.global_batch_size)
        is_sequential = self.is_sequential(places)
        counts = self._diffusion_counts()
        diffusion = self._deal(places[~is_sequential], counts, data_parallel_rank)
        sequential = self._deal(
            places[is_sequential], self.micro_batch_size - counts, data_parallel_rank
        )
        return [np.concatenate(pair) for pair in zip(diffusion, sequential, strict=True)]

    @property
    def _share(self) -> Fraction:
        return as_share(self.batch_split)

    def _diffusion_counts(self) -> NDArray[np.int64]:
        """Returns the number of diffusion samples of each micro-batch of a rank."""
        per_micro_batch = self._share * self.micro_batch_size
        if per_micro_batch.denominator == 1:
            return np.full(self.num_micro_batches, int(per_micro_batch))
        numbers = np.arange(self.num_micro_batches)
        num_diffusion = int(self._share * self.num_micro_batches)
        is_diffusion = _steps_up(numbers, num_diffusion, self.num_micro_batches)
        return self.micro_batch_size * is_diffusion.astype(np.int64)

    def _deal(
        self, places: NDArray[np.int64], counts: NDArray[np.int64], data_parallel_rank: int
    ) -> list[NDArray[np.int64]]:
        """Deals one phase's places: in order to micro-batches, within each to the ranks."""
        ends = np.cumsum(counts * self.data_parallel_size)
        starts = ends - counts * self.data_parallel_size + counts * data_parallel_rank
        return [places[start : start + count] for start, count in zip(starts, counts, strict=True)]
