"""AR: next-token prediction, from left to right.

Rows are the tokens before the last one in natural order; each predicts the token after it. The
token `objective.prepend_token` predicts the first one. The loss is the exact negative
log-likelihood.

Shapes: B samples of a micro-batch, T positions, N samples of a validation set.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_eso.batches.packing import pack_parts
from megatron_eso.batches.parts import plan_shifted
from megatron_eso.batches.rows import MicroBatch
from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.config.sections import Vocabulary
from megatron_eso.errors import ConfigError
from megatron_eso.objectives.objective import OnePhase, Samples, Step
from megatron_eso.objectives.row_counts import RowCounts


@dataclass(frozen=True, kw_only=True, slots=True)
class ArObjective(OnePhase):
    """The autoregressive objective.

    Attributes:
        mask_token_id: The mask token, which padding holds.
        first_token: The token that predicts the first one; None: the first one is not predicted.
    """

    phase_name = "ar"

    mask_token_id: int
    first_token: int | None

    @classmethod
    def from_config(cls, config: ObjectiveConfig, vocabulary: Vocabulary, *, seed: int) -> Self:
        """Build the objective from its section; it draws nothing from the seed.

        Raises:
            ConfigError: The tokenizer has no BOS token, and the section names it.
        """
        if config.prepend_token == "bos" and vocabulary.bos_token_id is None:
            raise ConfigError(
                'objective.prepend_token = "bos": the tokenizer has no BOS token; use "mask" or '
                '"none"'
            )
        tokens = {"mask": vocabulary.mask_token_id, "bos": vocabulary.bos_token_id, "none": None}
        return cls(mask_token_id=vocabulary.mask_token_id, first_token=tokens[config.prepend_token])

    def plan(self, samples: Samples, step: Step) -> MicroBatch:
        """Plan a micro-batch."""
        return self.plan_texts(samples)

    def count_targets(self, length_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the lengths, without the first token where it is not predicted."""
        return length_B if self.first_token is not None else length_B - 1

    def plan_validation(self, samples: Samples, num_samples: int) -> MicroBatch:
        """Plan samples once each."""
        return self.plan_texts(samples)

    def plan_order(self, samples: Samples, number: int) -> MicroBatch:
        """Plan samples in the one order that the objective has."""
        return self.plan_texts(samples)

    def plan_largest(self, phase_B: NDArray[np.int64], sequence_length: int) -> MicroBatch:
        """Plan whole samples."""
        return self.plan_texts(Samples.blank(len(phase_B), sequence_length, self.mask_token_id))

    def expect_rows(self, num_tokens: int) -> tuple[RowCounts]:
        """Return the rows of a sample: all of them carry loss."""
        rows = num_tokens if self.first_token is not None else num_tokens - 1
        pairs = rows * (rows + 1) / 2
        return (RowCounts(rows=rows, pairs=pairs, loss_rows=rows, loss_pairs=pairs),)

    def plan_texts(self, samples: Samples, *, elbo_weight: float = 1.0) -> MicroBatch:
        """Plan every text from left to right.

        Args:
            samples: The texts.
            elbo_weight: Weight of the tokens in the NELBO.
        """
        shape = samples.tokens_BT.shape
        natural_BT = np.tile(np.arange(shape[1]), (shape[0], 1))
        streams = samples.split(natural_BT, np.ones(shape, dtype=np.bool_))
        return pack_parts(
            [plan_shifted(stream, self.first_token, elbo_weight) for stream in streams],
            indices_B=samples.indices_B,
            phase_B=np.zeros(shape[0], dtype=np.int64),
            mask_token_id=self.mask_token_id,
        )
