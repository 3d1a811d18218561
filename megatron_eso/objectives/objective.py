"""The interface of objectives, which training, validation, estimates and records use.

Callers iterate over an objective's phases and never compare its name. An objective plans the rows
of a micro-batch, assigns them to phases, and combines the losses of the phases.

Shapes: B samples of a micro-batch, T positions, P phases, N samples of a validation set.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_eso.batches.packing import Stream, split_streams
from megatron_eso.batches.rows import MicroBatch
from megatron_eso.errors import ConfigError
from megatron_eso.objectives.row_counts import RowCounts

# The noise of validation does not depend on the run's seed, so runs are compared on the same noise.
VALIDATION_SEED = 0
MAX_STEPS = 2**40
"""More steps than a run has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A part of an objective whose loss is divided by the tokens of its own samples."""

    name: str
    """Name of the phase, as in the tag `train/loss_NAME`."""
    share: float
    """Share of the samples of a training step, in [0, 1]; the shares of all phases add up to 1."""
    is_temporary: bool = False
    """Whether only the first steps of a run have the phase, and no validation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The position of a training step in its run."""

    number: int
    """Steps before this one."""
    first_index: int
    """Global index of the step's first sample."""
    batch_size: int
    """Samples of the step over all ranks: `train.global_batch_size`."""

    @classmethod
    def late(cls, batch_size: int) -> "Step":
        """Return a step after every warm-up, with the samples from 0 on, for estimates."""
        return cls(number=MAX_STEPS, first_index=0, batch_size=batch_size)

    def next(self) -> "Step":
        """Return the step after this one."""
        return Step(
            number=self.number + 1,
            first_index=self.first_index + self.batch_size,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Samples:
    """The samples of a micro-batch, before noise.

    Attributes:
        tokens_BT: int64, natural order; any value beyond a sample's length.
        indices_B: int64, global indices of the samples, or indices in the validation set.
        length_B: int64, real tokens of each sample.
        documents_BT: int64, number of each token's document in the sample, ascending from 0; each
            document is then a stream. None: a sample is one stream.
    """

    tokens_BT: NDArray[np.int64]
    indices_B: NDArray[np.int64]
    length_B: NDArray[np.int64]
    documents_BT: NDArray[np.int64] | None = None

    def split(
        self, permutation_BT: NDArray[np.int64], is_masked_BT: NDArray[np.bool_]
    ) -> Iterator[Stream]:
        """Yield the streams with masked tokens, in the order that the permutation induces.

        Args:
            permutation_BT: `permutation[b, slot] = position`; slots beyond the length come last.
            is_masked_BT: Masked tokens in natural order.

        Raises:
            ValueError: The shapes of tokens and permutation differ.
        """
        return split_streams(
            self.tokens_BT, self.length_B, permutation_BT, is_masked_BT, self.documents_BT
        )

    def choose(self, numbers: NDArray[np.int64]) -> "Samples":
        """Return the samples of these numbers in the micro-batch."""
        documents_BT = self.documents_BT
        return Samples(
            tokens_BT=self.tokens_BT[numbers],
            indices_B=self.indices_B[numbers],
            length_B=self.length_B[numbers],
            documents_BT=None if documents_BT is None else documents_BT[numbers],
        )

    def repeat(self, times: int) -> "Samples":
        """Return all samples `times` times, one repetition after another."""
        return self.choose(np.tile(np.arange(len(self.indices_B)), times))

    @classmethod
    def blank(cls, num_samples: int, sequence_length: int, mask_token_id: int) -> "Samples":
        """Return whole samples of a token that has no meaning; every token can be a target."""
        return cls(
            tokens_BT=np.full((num_samples, sequence_length), int(mask_token_id == 0)),
            indices_B=np.arange(num_samples),
            length_B=np.full(num_samples, sequence_length),
        )


class Objective(Protocol):
    """A training objective. All its draws are functions of (seed, index of the sample)."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases in the order of their numbers.

        The share of the first one deals the samples to ranks and micro-batches.
        """

    def assign_phases(self, step: Step) -> NDArray[np.int64]:
        """Return `[N]`: the phase of each of the step's N samples, by its place."""

    def plan(self, samples: Samples, step: Step) -> MicroBatch:
        """Plan a micro-batch of a training step.

        The phase of a sample is that of `assign_phases`.

        Args:
            samples: The samples of the micro-batch.
            step: The step that they belong to.

        Returns:
            The rows and their targets, with the weights of the objective.
        """

    def count_targets(self, length_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens that the loss of each sample is divided by.

        Args:
            length_B: Real tokens of the samples.
        """

    def plan_validation(self, samples: Samples, num_samples: int) -> MicroBatch:
        """Plan samples of a validation set of N samples, each once for every phase.

        The noise is that of `VALIDATION_SEED`, the weights are those of the NELBO.

        Args:
            samples: Samples of the set.
            num_samples: N, the samples of the set.

        Returns:
            The rows and their targets, on the CPU.
        """

    def plan_order(self, samples: Samples, number: int) -> MicroBatch:
        """Plan samples with every token predicted, each in the `number`-th of its orders.

        The sum of a sample's losses is then its exact negative log-likelihood in that order.

        Args:
            samples: Samples of the set.
            number: Which of a sample's orders, from 0 on.

        Returns:
            The rows and their targets, on the CPU.

        Raises:
            ConfigError: The objective has no exact likelihood.
        """

    def plan_largest(self, phase_B: NDArray[np.int64], sequence_length: int) -> MicroBatch:
        """Plan the largest possible micro-batch for samples of these phases: all tokens masked.

        Args:
            phase_B: int64, phase of each sample.
            sequence_length: T, the tokens of a sample.

        Returns:
            A micro-batch of the largest shape, with meaningless tokens.
        """

    def validation_times(self, num_samples: int) -> Mapping[str, NDArray[np.float64]]:
        """Return the times `[N]` of a validation set for each phase that has times, by its name."""

    def expect_rows(self, num_tokens: int) -> tuple[RowCounts, ...]:
        """Return the expected rows of one sample of each phase, as the mean over its noise."""

    def combine(self, losses_P: Tensor) -> Tensor:
        """Combine the losses per token of the phases to the objective or the NELBO."""


class OnePhase:
    """What objectives share whose samples are all of one phase, with a loss for every token."""

    __slots__ = ()

    phase_name: ClassVar[str]
    """The name of the phase."""

    @property
    def phases(self) -> tuple[Phase]:
        """The one phase."""
        return (Phase(name=self.phase_name, share=1.0),)

    def assign_phases(self, step: Step) -> NDArray[np.int64]:
        """Return zeros: there is one phase."""
        return np.zeros(step.batch_size, dtype=np.int64)

    def count_targets(self, length_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the lengths: the loss is a mean over all tokens, masked or not."""
        return length_B

    def validation_times(self, num_samples: int) -> Mapping[str, NDArray[np.float64]]:
        """Return no times: samples have none, or more than one."""
        return {}

    def combine(self, losses_P: Tensor) -> Tensor:
        """Return the loss of the one phase."""
        return losses_P.sum()


def refuse_orders(name: str) -> NoReturn:
    """Refuse to plan orders for an objective that only bounds a likelihood."""
    raise ConfigError(
        f'objective.name = "{name}" has no exact likelihood in an order; leave --any-order out'
    )
