"""The numbers of a run that a checkpoint keeps besides its tensors.

How far the run has come, and how large the losses and gradients of its steps were. With the second
a resumed run judges every step as the uninterrupted one does.
"""

import math
from dataclasses import dataclass
from typing import Self

DECAY = 0.99
WARMUP_STEPS = 20
"""Steps before which nothing is judged: the first ones fall steeply."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counters:
    """How far a run has come; with the parameters, all that a checkpoint needs."""

    step: int = 0
    """Steps taken, skipped ones included."""
    consumed_samples: int = 0
    """Samples taken from the training order: the whole state of the data."""
    tokens: int = 0
    """Real tokens of these samples."""
    flops: float = 0.0
    """Floating-point operations that the objective needed for them."""
    skipped_steps: int = 0
    """Steps whose update was not applied, since loss or gradient was not finite, or exploded."""
    skipped_in_row: int = 0
    """Of these, the last ones without a step between them that was applied."""
    spikes: int = 0
    """Steps whose loss or gradient norm was flagged."""
    rollbacks: int = 0
    """Times that the run went back to a checkpoint and left the samples since out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MovingStatistics:
    """Exponential moving mean and variance of the values that were added."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def add(self, value: float) -> Self:
        """The statistics with one more value (West 1979, with weights that decay)."""
        weight = max(1 - DECAY, 1 / (self.count + 1))
        off = value - self.mean
        return type(self)(
            mean=self.mean + weight * off,
            variance=(1 - weight) * (self.variance + weight * off * off),
            count=self.count + 1,
        )

    def deviations(self, value: float) -> float:
        """Standard deviations that a value lies above the mean; 0 before there is a mean."""
        if self.count < WARMUP_STEPS:
            return 0.0
        if not math.isfinite(value):
            return math.inf
        return (value - self.mean) / math.sqrt(self.variance) if self.variance > 0 else 0.0
