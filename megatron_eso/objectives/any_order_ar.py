"""Any-order AR: every token is masked, and predicted from the tokens before it in a drawn order.

The rows are those of Eso-LM's sequential phase at alpha_0 = 0, with another distribution of orders.
The loss of a sample is its exact negative log-likelihood in its order. `set_dlm.py` trains on the
same rows.

Shapes: B samples of a micro-batch, T positions, N samples of a validation set.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_eso.batches.packing import Part, pack_parts
from megatron_eso.batches.parts import plan_clean, plan_queries, read_causally
from megatron_eso.batches.rows import MicroBatch
from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.config.sections import Vocabulary
from megatron_eso.objectives.noise.orders import OrderLaw, sort_slots
from megatron_eso.objectives.objective import VALIDATION_SEED, OnePhase, Samples, Step
from megatron_eso.objectives.row_counts import RowCounts, count_sequential_rows
from megatron_eso.randomness.bits import random_bits
from megatron_eso.randomness.purposes import Purpose


@dataclass(frozen=True, kw_only=True, slots=True)
class AnyOrderArObjective(OnePhase):
    """The any-order AR objective: the mean negative log-likelihood over orders.

    Attributes:
        seed: The run's seed.
        mask_token_id: Token of the queries.
        order: The distribution of the orders.
    """

    phase_name = "sequential"

    seed: int
    mask_token_id: int
    order: OrderLaw

    @classmethod
    def from_config(cls, config: ObjectiveConfig, vocabulary: Vocabulary, *, seed: int) -> Self:
        """Build the objective from its section."""
        return cls(
            seed=seed, mask_token_id=vocabulary.mask_token_id, order=OrderLaw.from_config(config)
        )

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
        samples = Samples.blank(len(phase_B), sequence_length, self.mask_token_id)
        return self._plan(samples, self.seed, Purpose.SEQUENTIAL_ORDER)

    def expect_rows(self, num_tokens: int) -> tuple[RowCounts]:
        """Return the rows of a sample, which are the same for every order."""
        return (count_sequential_rows(num_tokens, num_tokens),)

    def _plan(self, samples: Samples, seed: int, purpose: Purpose, number: int = 0) -> MicroBatch:
        """Plan samples in orders of (seed, purpose, index, number)."""
        num_tokens = samples.tokens_BT.shape[1]
        bits = [random_bits(seed, purpose, int(i), num_tokens, number) for i in samples.indices_B]
        keys_BT = self.order.keys(np.stack(bits))
        is_real_BT = np.arange(num_tokens) < samples.length_B[:, None]
        permutation_BT = sort_slots(
            is_real_BT, is_real_BT, clean_keys_BT=keys_BT, masked_keys_BT=keys_BT
        )
        return self.plan_orders(samples, permutation_BT)

    def plan_orders(self, samples: Samples, permutation_BT: NDArray[np.int64]) -> MicroBatch:
        """Plan samples in given orders.

        Args:
            samples: The samples.
            permutation_BT: `permutation[b, slot] = position`.
        """
        clean: list[Part] = []
        queries: list[Part] = []
        for stream in samples.split(permutation_BT, np.ones_like(permutation_BT, dtype=np.bool_)):
            clean.append(plan_clean(stream, read_causally(stream.length - 1)))
            queries.append(plan_queries(stream, clean[-1], self.mask_token_id))
        return pack_parts(
            [*clean, *queries],
            indices_B=samples.indices_B,
            phase_B=np.zeros(len(samples.indices_B), dtype=np.int64),
            mask_token_id=self.mask_token_id,
        )
