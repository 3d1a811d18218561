"""How far a step's loss or gradient norm lies off those of the steps before.

Exponential moving mean and variance, a few numbers that a checkpoint keeps, so that a resumed run
judges every step as the uninterrupted one does.
"""

import math
from dataclasses import dataclass
from typing import Self

DECAY = 0.99
WARMUP_STEPS = 20
"""Steps before which nothing is judged: the first ones fall steeply."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MovingStatistics:
    """Mean and variance of what was added; the newest counts most."""

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
