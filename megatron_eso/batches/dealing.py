"""The phase, rank and micro-batch of each sample of a global batch.

A *place* is a sample's index minus the first index of its step, in `0 .. global_batch_size - 1`.
The phase of a place depends only on the place, the global batch size and the share of the first
phase, so every layout trains on the same samples in the same phases. If an objective has one phase,
every place belongs to it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from megatron_eso.config.divisibility import as_share, check_dealing


def _steps_up(numbers: NDArray[np.int64], share: int, whole: int) -> NDArray[np.bool_]:
    """Mark `share` of every `whole` consecutive numbers, spread evenly (Bresenham's line)."""
    return (numbers + 1) * share // whole > numbers * share // whole


@dataclass(frozen=True, slots=True)
class PhaseSplit:
    """The split of a global batch's places into two phases, 0 and 1.

    Attributes:
        batch_size: Samples of a step.
        share: Share of the samples that belong to phase 0, in [0, 1].
    """

    batch_size: int
    share: float

    @property
    def num_first(self) -> int:
        """Samples of a step that belong to phase 0."""
        return int(as_share(self.share) * self.batch_size)

    def phases(self, places: npt.ArrayLike) -> NDArray[np.int64]:
        """Return the phase, 0 or 1, of a place or of an array of places of any shape."""
        places = np.asarray(places, dtype=np.int64)
        is_first = _steps_up(places, self.num_first, self.batch_size)
        return 1 - is_first.astype(np.int64)

    def numbers_in_first(self, places: npt.ArrayLike) -> NDArray[np.int64]:
        """Return the number of each place within phase 0; meaningless for places of phase 1."""
        places = np.asarray(places, dtype=np.int64)
        return places * self.num_first // self.batch_size


@dataclass(frozen=True, slots=True)
class Dealing:
    """The dealing of a global batch's places to phases, data-parallel ranks and micro-batches.

    If `micro_batch_size * share` is an integer, every micro-batch holds the same mix of both
    phases. Otherwise a micro-batch holds one phase, and micro-batches of both phases alternate
    evenly, in the same order on every rank.

    Attributes:
        global_batch_size: Samples of a step.
        micro_batch_size: Samples of a micro-batch.
        data_parallel_size: Number of data-parallel ranks.
        share: Share of the samples that belong to phase 0, in [0, 1].

    Raises:
        ConfigError: The phases cannot be dealt evenly; the message names sizes that can.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int
    share: float

    def __post_init__(self) -> None:
        """Refuse sizes whose samples of both phases cannot be dealt evenly."""
        check_dealing(
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            data_parallel_size=self.data_parallel_size,
            batch_split=self.share,
        )

    @property
    def split(self) -> PhaseSplit:
        """The phases of the places."""
        return PhaseSplit(self.global_batch_size, self.share)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step, on each rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def micro_batches(self, data_parallel_rank: int) -> list[NDArray[np.int64]]:
        """Return the places of each micro-batch of one rank, those of phase 0 first.

        Over all ranks, each place comes exactly once. On every rank, the list has the same length
        and its micro-batches have the same number of samples of either phase.

        Args:
            data_parallel_rank: The rank, from 0 on.

        Returns:
            One int64 array of places for each micro-batch.

        Raises:
            ValueError: The rank does not exist.
        """
        if not 0 <= data_parallel_rank < self.data_parallel_size:
            raise ValueError(
                f"data_parallel_rank {data_parallel_rank} is not in [0, {self.data_parallel_size})"
            )
        places = np.arange(self.global_batch_size)
        phases = self.split.phases(places)
        counts = self._count_first()
        first = self._deal(places[phases == 0], counts, data_parallel_rank)
        second = self._deal(places[phases == 1], self.micro_batch_size - counts, data_parallel_rank)
        return [np.concatenate(pair) for pair in zip(first, second, strict=True)]

    def _count_first(self) -> NDArray[np.int64]:
        """Return the number of samples of phase 0 in each micro-batch of a rank."""
        share = as_share(self.share)
        per_micro_batch = share * self.micro_batch_size
        if per_micro_batch.denominator == 1:
            return np.full(self.num_micro_batches, int(per_micro_batch))
        numbers = np.arange(self.num_micro_batches)
        num_first = int(share * self.num_micro_batches)
        is_first = _steps_up(numbers, num_first, self.num_micro_batches)
        return self.micro_batch_size * is_first.astype(np.int64)

    def _deal(
        self, places: NDArray[np.int64], counts: NDArray[np.int64], data_parallel_rank: int
    ) -> list[NDArray[np.int64]]:
        """Deal one phase's places in order: to micro-batches, and within each to ranks."""
        ends = np.cumsum(counts * self.data_parallel_size)
        starts = ends - counts * self.data_parallel_size + counts * data_parallel_rank
        return [places[start : start + count] for start, count in zip(starts, counts, strict=True)]


def count_tokens(
    length_N: NDArray[np.int64], phase_N: NDArray[np.int64], num_phases: int
) -> tuple[int, ...]:
    """Return the tokens of each phase in a step: the denominators of its losses.

    Args:
        length_N: Tokens of the step's samples that losses are divided by, by place.
        phase_N: Phases of the step's samples.
        num_phases: Phases of the objective.

    Returns:
        The tokens of each phase, in the order of the phases.
    """
    return tuple(int(length_N[phase_N == phase].sum()) for phase in range(num_phases))
