"""The log-linear noise schedule of Eso-LM: arXiv 2506.01928, the reference's trainer_base.py."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# The largest t' of the reference is 1 - EPSILON; the same factor scales the derivative.
EPSILON = 1e-3


@dataclass(frozen=True, slots=True)
class LogLinearSchedule:
    """alpha_t = alpha_0 (1 - t') with t' = (1 - 1e-3) t: the share of clean tokens at time t.

    Times are float64 in [0, 1], of any shape. At alpha_0 = 1 everything is diffusion, at
    alpha_0 = 0 everything is sequential.
    """

    alpha_0: float

    def alpha(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the probability that a token is clean at the times t."""
        return self.alpha_0 * (1.0 - (1.0 - EPSILON) * t)

    def elbo_weight(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return -alpha'_t / (1 - alpha_t), the weight of a masked token's loss in the NELBO.

        At alpha_0 = 1 it is 1 / t, with a pole at 0; below, it is at most alpha_0 / (1 - alpha_0).
        """
        return self.alpha_0 * (1.0 - EPSILON) / (1.0 - self.alpha(t))
