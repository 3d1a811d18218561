"""Any-order AR: every token is masked, and predicted from the tokens before it in a drawn order.

The rows are those of Eso-LM's sequential phase at alpha_0 = 0, with another distribution of orders.
The loss of a sample is its exact negative log-likelihood in its order. Set Diffusion, arXiv
2607.01775, trains on the same rows.

Shapes: B samples of a micro-batch, T positions, N samples of a validation set.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.objectives.noise import Noise
from megatron_eso.objectives.objective import VALIDATION_SEED, Phase, Samples, Step
from megatron_eso.objectives.orders import left_to_right_keys, sort_slots, uniform_keys
from megatron_eso.objectives.row_counts import RowCounts, count_sequential_rows
from megatron_eso.objectives.rows import MicroBatch, plan_rows
from megatron_eso.randomness.bits import random_bits
from megatron_eso.randomness.purposes import Purpose


@dataclass(frozen=True, kw_only=True, slots=True)
class AnyOrderArObjective:
    """The any-order AR objective: the mean negative log-likelihood over orders.

    Attributes:
        seed: The run's seed.
        mask_token_id: Token of the queries.
        is_random: Whether the order of each sample is drawn; otherwise it is left to right.
    """

    seed: int
    mask_token_id: int
    is_random: bool

    @classmethod
    def from_config(cls, config: ObjectiveConfig, *, seed: int, mask_token_id: int) -> Self:
        """Build the objective from its section."""
        return cls(seed=seed, mask_token_id=mask_token_id, is_random=config.order == "uniform")

    @property
    def phases(self) -> tuple[Phase]:
        """The sequential phase alone."""
        return (Phase(name="sequential", share=1.0),)

    def plan(self, samples: Samples, step: Step) -> MicroBatch:
        """Plan a micro-batch, each sample in the order of its index."""
        return self._plan(samples, self.seed, Purpose.SEQUENTIAL_ORDER)

    def plan_validation(self, samples: Samples, num_samples: int) -> MicroBatch:
        """Plan samples once each, in the order of their index in the set."""
        return self._plan(samples, VALIDATION_SEED, Purpose.VALIDATION_SEQUENTIAL_ORDER)

    def plan_order(self, samples: Samples, number: int) -> MicroBatch:
        """Plan samples in the `number`-th of their orders."""
        return self._plan(samples, VALIDATION_SEED, Purpose.ANY_ORDER, number)

    def plan_largest(self, phase_B: NDArray[np.int64], sequence_length: int) -> MicroBatch:
        """Plan whole samples: T - 1 clean rows and T queries each."""
        shape = (len(phase_B), sequence_length)
        samples = Samples(
            # Any token except the mask can be a target.
            tokens_BT=np.full(shape, int(self.mask_token_id == 0)),
            indices_B=np.arange(shape[0]),
            length_B=np.full(shape[0], sequence_length),
        )
        return self._plan(samples, self.seed, Purpose.SEQUENTIAL_ORDER)

    def validation_times(self, num_samples: int) -> Mapping[str, NDArray[np.float64]]:
        """Return no times: the objective has none."""
        return {}

    def expect_rows(self, num_tokens: int) -> tuple[RowCounts]:
        """Return the rows of a sample, which are the same for every order."""
        return (count_sequential_rows(num_tokens, num_tokens),)

    def combine(self, losses_P: Tensor) -> Tensor:
        """Return the loss of the one phase."""
        return losses_P.sum()

    def _plan(self, samples: Samples, seed: int, purpose: Purpose, number: int = 0) -> MicroBatch:
        """Plan samples with every token masked, in orders of (seed, purpose, index, number)."""
        # Draw the orders: sort keys for every position.
        shape = samples.tokens_BT.shape
        is_real_BT = np.arange(shape[1]) < samples.length_B[:, None]
        keys_BT = left_to_right_keys(shape)
        if self.is_random:
            bits = [random_bits(seed, purpose, int(i), shape[1], number) for i in samples.indices_B]
            keys_BT = uniform_keys(np.stack(bits))
        # Mask every token of a sample, and sort its slots by the keys.
        noise = Noise(
            length_B=samples.length_B,
            is_masked_BT=is_real_BT,
            permutation_BT=sort_slots(
                is_real_BT, is_real_BT, clean_keys_BT=keys_BT, masked_keys_BT=keys_BT
            ),
            t_B=np.full(shape[0], np.nan),
            is_sequential_B=np.ones(shape[0], dtype=np.bool_),
        )
        return plan_rows(
            samples.tokens_BT,
            noise,
            indices_B=samples.indices_B,
            phase_B=np.zeros(shape[0], dtype=np.int64),
            weight_B=np.ones(shape[0]),
            elbo_weight_B=np.ones(shape[0]),
            mask_token_id=self.mask_token_id,
        )
