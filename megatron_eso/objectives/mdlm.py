"""MDLM: masked diffusion with bidirectional attention (arXiv 2406.07524).

Noise and weights are those of Eso-LM's diffusion phase at alpha_0 = 1. Rows are in natural order,
and each reads all rows of its sample.

Shapes: B samples of a micro-batch, T positions, N samples of a validation set.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_eso.batches.dealing import PhaseSplit
from megatron_eso.batches.packing import pack_parts
from megatron_eso.batches.parts import plan_mixed, read_fully
from megatron_eso.batches.rows import MicroBatch
from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.config.sections import Vocabulary
from megatron_eso.objectives.noise.schedule import LogLinearSchedule
from megatron_eso.objectives.noise.slots import Noise, diffusion_times, draw_noise, validation_times
from megatron_eso.objectives.objective import (
    VALIDATION_SEED,
    OnePhase,
    Samples,
    Step,
    refuse_orders,
)
from megatron_eso.objectives.row_counts import RowCounts, expect_full_rows

SCHEDULE = LogLinearSchedule(1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class MdlmObjective(OnePhase):
    """The MDLM objective.

    Attributes:
        seed: The run's seed.
        mask_token_id: Token of masked positions.
        is_weighted: Whether the loss has the weights of the NELBO ("elbo"); otherwise every weight
            is 1 ("low_var").
        sampling_eps: Lowest time.
    """

    phase_name = "diffusion"

    seed: int
    mask_token_id: int
    is_weighted: bool
    sampling_eps: float

    @classmethod
    def from_config(cls, config: ObjectiveConfig, vocabulary: Vocabulary, *, seed: int) -> Self:
        """Build the objective from its section."""
        return cls(
            seed=seed,
            mask_token_id=vocabulary.mask_token_id,
            is_weighted=config.loss_type == "elbo",
            sampling_eps=config.sampling_eps,
        )

    def plan(self, samples: Samples, step: Step) -> MicroBatch:
        """Plan a micro-batch; times are stratified over the step."""
        places_B = samples.indices_B - step.first_index
        times_B = diffusion_times(
            self.seed,
            step.first_index,
            PhaseSplit(step.batch_size, 1.0),
            places_B,
            sampling_eps=self.sampling_eps,
        )
        return self._draw(samples, self.seed, times_B)

    def plan_validation(self, samples: Samples, num_samples: int) -> MicroBatch:
        """Plan samples once each; times are stratified over N samples."""
        times_B = validation_times(
            VALIDATION_SEED, samples.indices_B, num_samples, sampling_eps=self.sampling_eps
        )
        return self._draw(samples, VALIDATION_SEED, times_B, is_validation=True)

    def plan_order(self, samples: Samples, number: int) -> MicroBatch:
        """Refuse: the objective bounds a likelihood only."""
        refuse_orders("mdlm")

    def plan_largest(self, phase_B: NDArray[np.int64], sequence_length: int) -> MicroBatch:
        """Plan whole samples with every token masked."""
        shape = (len(phase_B), sequence_length)
        noise = Noise(
            length_B=np.full(shape[0], sequence_length),
            is_masked_BT=np.ones(shape, dtype=np.bool_),
            permutation_BT=np.tile(np.arange(sequence_length), (shape[0], 1)),
            t_B=np.ones(shape[0]),
            is_sequential_B=np.zeros(shape[0], dtype=np.bool_),
        )
        return self.plan_noise(Samples.blank(*shape, self.mask_token_id), noise)

    def validation_times(self, num_samples: int) -> Mapping[str, NDArray[np.float64]]:
        """Return the times of the samples."""
        indices_N = np.arange(num_samples)
        times_N = validation_times(
            VALIDATION_SEED, indices_N, num_samples, sampling_eps=self.sampling_eps
        )
        return {"diffusion": times_N}

    def expect_rows(self, num_tokens: int) -> tuple[RowCounts]:
        """Return the mean rows of a sample."""
        return (expect_full_rows(num_tokens, self.sampling_eps),)

    def plan_noise(self, samples: Samples, noise: Noise, *, for_nelbo: bool = False) -> MicroBatch:
        """Plan rows for given times and masks, with the weights of the objective or the NELBO."""
        elbo_weight_B = SCHEDULE.elbo_weight(noise.t_B)
        is_weighted = self.is_weighted or for_nelbo
        weight_B = elbo_weight_B if is_weighted else np.ones_like(elbo_weight_B)
        natural_BT = np.tile(np.arange(samples.tokens_BT.shape[1]), (len(noise.t_B), 1))
        return pack_parts(
            [
                plan_mixed(
                    stream,
                    read_fully(stream.length),
                    self.mask_token_id,
                    weight=weight_B[stream.sample],
                    elbo_weight=elbo_weight_B[stream.sample],
                )
                for stream in samples.split(natural_BT, noise.is_masked_BT)
            ],
            indices_B=samples.indices_B,
            phase_B=np.zeros(len(noise.t_B), dtype=np.int64),
            mask_token_id=self.mask_token_id,
        )

    def _draw(
        self,
        samples: Samples,
        seed: int,
        times_B: NDArray[np.float64],
        *,
        is_validation: bool = False,
    ) -> MicroBatch:
        """Draw masks for given times, and plan the rows."""
        noise = draw_noise(
            seed,
            samples.indices_B,
            np.zeros(len(times_B), dtype=np.bool_),
            times_B,
            SCHEDULE,
            samples.tokens_BT.shape[1],
            length_B=samples.length_B,
            is_validation=is_validation,
        )
        return self.plan_noise(samples, noise, for_nelbo=is_validation)
