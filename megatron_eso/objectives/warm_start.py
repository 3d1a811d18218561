"""A warm start: the first steps train next-token prediction, more and more samples the objective.

Autoregressive weights then change over to the objective without a jump. The share of samples that
are planned as AR rows falls linearly from 1 to 0; they have a phase and a denominator of their own.

Shapes: B samples of a micro-batch, N samples of a step or of a validation set.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_eso.batches.packing import join_batches
from megatron_eso.batches.rows import MicroBatch
from megatron_eso.objectives.ar import ArObjective
from megatron_eso.objectives.objective import Objective, Phase, Samples, Step
from megatron_eso.objectives.row_counts import RowCounts

GOLDEN_RATIO = (1 + 5**0.5) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStart:
    """An objective whose first steps train some samples by next-token prediction.

    Attributes:
        objective: The objective after the warm start, and of every validation.
        ar: The rows of next-token prediction.
        num_steps: Steps of the warm start.
    """

    objective: Objective
    ar: ArObjective
    num_steps: int

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of the objective, then that of next-token prediction.

        Shares are those after the warm start.
        """
        return (*self.objective.phases, Phase(name="ar", share=0.0, is_temporary=True))

    def assign_phases(self, step: Step) -> NDArray[np.int64]:
        """Return the phase of each place; in every phase the same share is taken for AR."""
        phase_N = self.objective.assign_phases(step)
        num_left = max(self.num_steps - step.number, 0)
        for phase in range(len(self.objective.phases)):
            of_phase = np.flatnonzero(phase_N == phase)
            # Multiples of the golden ratio are spread evenly over the places, and over every second
            # or fourth of them as well, so ranks and micro-batches get about equal shares.
            order = np.argsort(np.arange(len(of_phase)) * GOLDEN_RATIO % 1)
            num_ar = len(of_phase) * num_left // self.num_steps
            phase_N[of_phase[order[:num_ar]]] = len(self.objective.phases)
        return phase_N

    def plan(self, samples: Samples, step: Step) -> MicroBatch:
        """Plan a micro-batch, some samples of it as AR rows."""
        phase_B = self.assign_phases(step)[samples.indices_B - step.first_index]
        is_ar_B = phase_B == len(self.objective.phases)
        if not is_ar_B.any():
            return self.objective.plan(samples, step)
        own, next_token = np.flatnonzero(~is_ar_B), np.flatnonzero(is_ar_B)
        batch = self.ar.plan_texts(samples.choose(next_token), elbo_weight=0.0)
        planned = [(next_token, batch)]
        if len(own):
            planned.insert(0, (own, self.objective.plan(samples.choose(own), step)))
        return join_batches(
            planned,
            indices_B=samples.indices_B,
            phase_B=phase_B,
            mask_token_id=self.ar.mask_token_id,
        )

    def count_targets(self, length_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the lengths: next-token prediction has as many targets as the objective."""
        return self.objective.count_targets(length_B)

    def plan_validation(self, samples: Samples, num_samples: int) -> MicroBatch:
        """Plan samples for the objective."""
        return self.objective.plan_validation(samples, num_samples)

    def plan_order(self, samples: Samples, number: int) -> MicroBatch:
        """Plan samples in an order of the objective."""
        return self.objective.plan_order(samples, number)

    def plan_largest(self, phase_B: NDArray[np.int64], sequence_length: int) -> MicroBatch:
        """Plan the largest micro-batch of the objective; AR rows are no more."""
        return self.objective.plan_largest(phase_B, sequence_length)

    def validation_times(self, num_samples: int) -> Mapping[str, NDArray[np.float64]]:
        """Return the times of the objective."""
        return self.objective.validation_times(num_samples)

    def expect_rows(self, num_tokens: int) -> tuple[RowCounts, ...]:
        """Return the mean rows of a sample of each phase."""
        return (*self.objective.expect_rows(num_tokens), *self.ar.expect_rows(num_tokens))

    def combine(self, losses_P: Tensor) -> Tensor:
        """Return the loss of the objective plus that of next-token prediction."""
        return self.objective.combine(losses_P[:-1]) + losses_P[-1]
