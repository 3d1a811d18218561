"""From sample indices to the micro-batches of a step: the same on every rank, with no broadcast.

Here the texts of `data` and the noise of `objectives` meet.

Shapes: N samples of a step, B samples of a micro-batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_eso.config.sections import Config, ParallelConfig
from megatron_eso.data.samples.lengths import draw_lengths
from megatron_eso.data.samples.training_data import TrainingData
from megatron_eso.data.samples.validation_data import ValidationData
from megatron_eso.errors import ConfigError
from megatron_eso.objectives.dealing import Dealing
from megatron_eso.objectives.objective import Objective, Samples, Step
from megatron_eso.objectives.rows import MicroBatch
from megatron_eso.randomness.purposes import NOISE_VERSION
from megatron_eso.runs.checkpoint_state import CheckpointState


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepPlan:
    """What a rank takes a step with.

    Attributes:
        micro_batches: This rank's micro-batches; as many on every rank.
        tokens: Real tokens of each phase in the global batch, the same on every rank: the
            denominators of the loss.
    """

    micro_batches: list[MicroBatch]
    tokens: tuple[int, ...]

    def pin_memory(self) -> Self:
        """Return the plan with its tensors in pinned memory."""
        return replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])


class TrainingBatches:
    """The micro-batches of every step, as a function of the samples consumed before it.

    Args:
        config: The resolved configuration.
        objective: Plans the rows.
        data: The training shards.
        data_parallel_size: Number of data-parallel ranks.

    Raises:
        ConfigError: The global batch cannot be dealt evenly.
    """

    def __init__(
        self, config: Config, objective: Objective, data: TrainingData, data_parallel_size: int
    ) -> None:
        self.objective = objective
        self.data = data
        self.dealing = Dealing(
            config.train.global_batch_size,
            config.train.micro_batch_size,
            data_parallel_size,
            objective.phases[0].share,
        )
        self._seed = config.run.seed
        self._config = config.data
        self._row_multiple = row_multiple(config.parallel)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint records of the samples and their noise; equal on all ranks."""
        return {"noise_version": NOISE_VERSION, "data": self.data.state}

    def resume(self, record: CheckpointState, source: str) -> None:
        """Continue from the record of a checkpoint; before the first step is planned.

        Args:
            record: With `state` and the counters of the run that wrote it.
            source: The checkpoint, for errors.

        Raises:
            ConfigError: Its samples or their noise are not those of this run.
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
        """Return the step that is taken after `number` steps and `consumed_samples` samples."""
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
        length_N = draw_lengths(
            self._seed,
            step.first_index + np.arange(step.batch_size),
            self._config.ssl_ratio,
            self._config.sequence_length,
        )
        micro_batches = []
        for places in self.dealing.micro_batches(data_parallel_rank):
            indices = step.first_index + places
            samples = Samples(
                tokens_BT=self.data.samples(indices),
                indices_B=indices,
                length_B=length_N[places],
            )
            micro_batches.append(self._pad(self.objective.plan(samples, step)))
        tokens = self.dealing.count_tokens(length_N, len(self.objective.phases))
        return StepPlan(micro_batches=micro_batches, tokens=tokens)

    def plan_largest(self) -> MicroBatch:
        """Plan a micro-batch with at least as many rows of every kind as any of the run's."""
        phases = [self.dealing.split.phases(places) for places in self.dealing.micro_batches(0)]
        kinds = {tuple(phase_B.tolist()): phase_B for phase_B in phases}
        length = self._config.sequence_length
        plans = [self.objective.plan_largest(phase_B, length) for phase_B in kinds.values()]
        return self._pad(max(plans, key=lambda plan: plan.rows.num_rows))

    def _pad(self, micro_batch: MicroBatch) -> MicroBatch:
        return micro_batch.pad(self._row_multiple, self.data.vocabulary.mask_token_id)


class ValidationBatches:
    """The micro-batches of a validation set; the whole is the same on every layout.

    Args:
        config: The resolved configuration.
        objective: Plans the rows, always with the weights of the NELBO.
        data: The validation set.

    Attributes:
        num_samples: N, the samples that a validation reads: `validation.num_samples`, or all.
        sequence_length: T.
    """

    def __init__(self, config: Config, objective: Objective, data: ValidationData) -> None:
        self.objective = objective
        self.sequence_length = config.data.sequence_length
        self.num_samples = min(config.validation.num_samples or data.num_samples, data.num_samples)
        self._data = data
        self._micro_batch_size = config.validation.micro_batch_size
        self._row_multiple = row_multiple(config.parallel)

    def plan(self, data_parallel_rank: int, data_parallel_size: int) -> Iterator[MicroBatch]:
        """Plan this rank's part of the set, each sample once for each phase it goes through."""
        for samples in self._read(data_parallel_rank, data_parallel_size):
            yield self._pad(self.objective.plan_validation(samples, self.num_samples))

    def plan_order(
        self, number: int, data_parallel_rank: int, data_parallel_size: int
    ) -> Iterator[MicroBatch]:
        """Plan this rank's part of the set for exact likelihoods, each sample in one order.

        Args:
            number: Which of each sample's independent orders.
            data_parallel_rank: This rank.
            data_parallel_size: Number of ranks that share the set.
        """
        for samples in self._read(data_parallel_rank, data_parallel_size):
            yield self._pad(self.objective.plan_order(samples, number))

    def _read(self, data_parallel_rank: int, data_parallel_size: int) -> Iterator[Samples]:
        """Read this rank's samples of the set, by micro-batch."""
        mine = np.arange(data_parallel_rank, self.num_samples, data_parallel_size)
        for start in range(0, len(mine), self._micro_batch_size):
            indices: NDArray[np.int64] = mine[start : start + self._micro_batch_size]
            yield Samples(
                tokens_BT=self._data.samples(indices),
                indices_B=indices,
                length_B=np.full(len(indices), self.sequence_length),
            )

    def _pad(self, micro_batch: MicroBatch) -> MicroBatch:
        return micro_batch.pad(self._row_multiple, self._data.vocabulary.mask_token_id)


def row_multiple(parallel: ParallelConfig) -> int:
    """Return what the number of rows must divide by: sequence parallelism splits it over TP."""
    return parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
