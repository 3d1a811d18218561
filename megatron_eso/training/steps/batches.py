"""Plans the micro-batches of steps and validations from sample numbers, without communication.

Shapes: N samples of a step, B samples of a micro-batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_eso.batches.dealing import Dealing, count_tokens
from megatron_eso.batches.rows import MicroBatch
from megatron_eso.config.sections import TrainConfig, ValidationConfig
from megatron_eso.data.samples.training_data import TrainingData
from megatron_eso.data.samples.validation_data import ValidationData
from megatron_eso.errors import ConfigError
from megatron_eso.objectives.objective import Objective, Samples, Step
from megatron_eso.randomness.purposes import NOISE_VERSION
from megatron_eso.runs.checkpoint_state import CheckpointState


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepPlan:
    """The micro-batches of a step on one rank, and the denominators of the loss.

    Attributes:
        micro_batches: This rank's micro-batches; every rank has the same number of them.
        tokens: The number of tokens that the loss of each phase is divided by: over the global
            batch, equal on all ranks.
    """

    micro_batches: list[MicroBatch]
    tokens: tuple[int, ...]

    def pin_memory(self) -> Self:
        """Return the plan with its tensors in pinned memory."""
        return replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])


class TrainingBatches:
    """The micro-batches of every step, a function of the number of samples consumed before it.

    Args:
        objective: The objective, which plans the rows.
        data: The training shards.
        config: The section `train`: sizes of the global batch and a micro-batch.
        data_parallel_size: The number of data-parallel ranks.
        row_multiple: Rows and loss rows of a micro-batch are padded to a multiple of this.

    Raises:
        ConfigError: The global batch cannot be divided evenly among ranks and phases.
    """

    def __init__(
        self,
        objective: Objective,
        data: TrainingData,
        config: TrainConfig,
        *,
        data_parallel_size: int,
        row_multiple: int,
    ) -> None:
        self.objective = objective
        self.data = data
        self.dealing = Dealing(
            config.global_batch_size,
            config.micro_batch_size,
            data_parallel_size,
            objective.phases[0].share,
        )
        self._row_multiple = row_multiple

    @property
    def state(self) -> dict[str, Any]:
        """Return the state of samples and noise for a checkpoint; equal on all ranks."""
        return {"noise_version": NOISE_VERSION, "data": self.data.state}

    def resume(self, record: CheckpointState, source: str) -> None:
        """Continue from a checkpoint's record; call it before the first step is planned.

        Args:
            record: The checkpoint's `state.json`.
            source: The path of the checkpoint, for errors.

        Raises:
            ConfigError: The checkpoint's samples or noise differ from this run's.
        """
        if record.noise_version != NOISE_VERSION or record.data is None:
            raise ConfigError(
                f"{source}/state.json: noise_version = {record.noise_version}, but this "
                f"version of megatron-eso draws {NOISE_VERSION}: a run keeps its noise; use the "
                f"version that wrote it, or start another run.directory with "
                f"checkpoint.init_from = {source}"
            )
        self.data.resume(
            record.data,
            consumed_samples=record.counters.consumed_samples,
            source=source,
        )

    def step(self, number: int, consumed_samples: int) -> Step:
        """Return the step that follows after `number` steps and `consumed_samples` samples."""
        return Step(
            number=number,
            first_index=consumed_samples,
            batch_size=self.dealing.global_batch_size,
        )

    def plan_step(self, step: Step, data_parallel_rank: int) -> StepPlan:
        """Read and plan all micro-batches of one rank's step; no communication.

        Raises:
            DataError: A shard is damaged.
        """
        length_N = self.data.lengths(step.first_index + np.arange(step.batch_size))
        micro_batches = []
        for places in self.dealing.micro_batches(data_parallel_rank):
            indices = step.first_index + places
            tokens_BT = self.data.samples(indices)
            samples = Samples(
                tokens_BT=tokens_BT,
                indices_B=indices,
                length_B=length_N[places],
                documents_BT=self.data.documents(tokens_BT),
            )
            micro_batches.append(self._pad(self.objective.plan(samples, step)))
        targets_N = self.objective.count_targets(length_N)
        phase_N = self.objective.assign_phases(step)
        tokens = count_tokens(targets_N, phase_N, len(self.objective.phases))
        return StepPlan(micro_batches=micro_batches, tokens=tokens)

    def plan_largest(self) -> MicroBatch:
        """Plan a micro-batch that has at least as many rows of each kind as any of the run."""
        phases = [self.dealing.split.phases(places) for places in self.dealing.micro_batches(0)]
        kinds = {tuple(phase_B.tolist()): phase_B for phase_B in phases}
        length = self.data.sequence_length
        plans = [self.objective.plan_largest(phase_B, length) for phase_B in kinds.values()]
        return self._pad(max(plans, key=lambda plan: plan.rows.num_rows))

    def _pad(self, micro_batch: MicroBatch) -> MicroBatch:
        return micro_batch.pad(self._row_multiple, self.data.vocabulary.mask_token_id)


class ValidationBatches:
    """The micro-batches of a validation set; all ranks together read the same on every layout.

    Args:
        objective: The objective, which plans the rows with the weights of the NELBO.
        data: The validation set.
        config: The section `validation`: sizes of the set and a micro-batch.
        row_multiple: Rows and loss rows of a micro-batch are padded to a multiple of this.

    Attributes:
        num_samples: N, the number of samples of a validation: `validation.num_samples`, or all.
        num_targets: The number of tokens that the loss of a sample is divided by.
    """

    def __init__(
        self,
        objective: Objective,
        data: ValidationData,
        config: ValidationConfig,
        *,
        row_multiple: int,
    ) -> None:
        self.objective = objective
        self.num_targets = int(objective.count_targets(np.array([data.sequence_length]))[0])
        self.num_samples = min(config.num_samples or data.num_samples, data.num_samples)
        self._data = data
        self._micro_batch_size = config.micro_batch_size
        self._row_multiple = row_multiple

    def plan(self, data_parallel_rank: int, data_parallel_size: int) -> Iterator[MicroBatch]:
        """Plan this rank's part of the set; each sample comes once in each phase."""
        return self.plan_by(
            lambda samples: self.objective.plan_validation(samples, self.num_samples),
            data_parallel_rank,
            data_parallel_size,
        )

    def plan_order(
        self, number: int, data_parallel_rank: int, data_parallel_size: int
    ) -> Iterator[MicroBatch]:
        """Plan this rank's part of the set for exact likelihoods, each sample in one order.

        Args:
            number: The number of the order; orders of a sample are independent.
            data_parallel_rank: This rank's number.
            data_parallel_size: The number of ranks that share the set.
        """
        return self.plan_by(
            lambda samples: self.objective.plan_order(samples, number),
            data_parallel_rank,
            data_parallel_size,
        )

    def plan_by(
        self,
        plan: Callable[[Samples], MicroBatch],
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> Iterator[MicroBatch]:
        """Plan this rank's part of the set by a function of the samples of a micro-batch.

        Args:
            plan: Returns the rows of samples and their targets, without padding.
            data_parallel_rank: This rank's number.
            data_parallel_size: The number of ranks that share the set.
        """
        for samples in self._read(data_parallel_rank, data_parallel_size):
            yield self._pad(plan(samples))

    def count(self, data_parallel_rank: int, data_parallel_size: int) -> int:
        """Return the number of micro-batches of this rank's part of the set."""
        num_samples = len(range(data_parallel_rank, self.num_samples, data_parallel_size))
        return -(-num_samples // self._micro_batch_size)

    def _read(self, data_parallel_rank: int, data_parallel_size: int) -> Iterator[Samples]:
        """Read this rank's samples of the set, one micro-batch at a time."""
        mine = np.arange(data_parallel_rank, self.num_samples, data_parallel_size)
        for start in range(0, len(mine), self._micro_batch_size):
            indices: NDArray[np.int64] = mine[start : start + self._micro_batch_size]
            tokens_BT = self._data.samples(indices)
            yield Samples(
                tokens_BT=tokens_BT,
                indices_B=indices,
                length_B=self._data.lengths(indices),
                documents_BT=self._data.documents(tokens_BT),
            )

    def _pad(self, micro_batch: MicroBatch) -> MicroBatch:
        return micro_batch.pad(self._row_multiple, self._data.vocabulary.mask_token_id)
