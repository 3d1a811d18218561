"""The numbers of a run that a checkpoint records besides its tensors.

They count steps and samples, and keep statistics of losses and gradient norms. With these, a
resumed run flags and skips the same steps as an uninterrupted one.
"""

import math
from dataclasses import dataclass
from typing import Self

DECAY = 0.99
WARMUP_STEPS = 20
"""Values before which no step is flagged or skipped, because the first losses fall steeply."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counters:
    """Counts of a run's steps, samples, tokens and FLOPs."""

    step: int = 0
    """Steps taken, skipped ones included."""
    consumed_samples: int = 0
    """Samples taken from the training order: the whole state of the loader."""
    tokens: int = 0
    """Real tokens of these samples."""
    flops: float = 0.0
    """Floating-point operations that the objective needed for them."""
    skipped_steps: int = 0
    """Steps whose update was skipped: loss or gradient was not finite or far above the mean."""
    skipped_in_row: int = 0
    """Skipped steps since the last applied one."""
    spikes: int = 0
    """Steps whose loss or gradient norm was flagged."""
    rollbacks: int = 0
    """Times that the run went back to a checkpoint and left out the samples after it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MovingStatistics:
    """The exponential moving mean and variance of values."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def add(self, value: float) -> Self:
        """Return the statistics with one more value (West 1979, with decaying weights)."""
        weight = max(1 - DECAY, 1 / (self.count + 1))
        off = value - self.mean
        return type(self)(
            mean=self.mean + weight * off,
            variance=(1 - weight) * (self.variance + weight * off * off),
            count=self.count + 1,
        )

    def deviations(self, value: float) -> float:
        """Return how many standard deviations a value is above the mean.

        Returns:
            0 for the first WARMUP_STEPS values, infinity for a value that is not finite.
        """
        if self.count < WARMUP_STEPS:
            return 0.0
        if not math.isfinite(value):
            return math.inf
        return (value - self.mean) / math.sqrt(self.variance) if self.variance > 0 else 0.0
