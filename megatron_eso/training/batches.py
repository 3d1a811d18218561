"""From sample indices to the row plans of a step: the same on every rank, with no broadcast.

Shapes: B samples of a micro-batch, N samples of a step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_eso.config.sections import Config
from megatron_eso.data.samples.framing import Framing
from megatron_eso.data.samples.training_data import TrainingData
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.errors import ConfigError
from megatron_eso.objectives.dealing import Dealing
from megatron_eso.objectives.loss import PhaseTokens, count_phase_tokens
from megatron_eso.objectives.noise import (
    Noise,
    diffusion_times,
    draw_any_order,
    draw_lengths,
    draw_noise,
    validation_times,
)
from megatron_eso.objectives.rows import RowPlan, plan_rows
from megatron_eso.objectives.schedule import LogLinearSchedule
from megatron_eso.randomness.purposes import NOISE_VERSION
from megatron_eso.runs.checkpoint_state import CheckpointState

# The noise of validation does not depend on a run's seed: runs are compared on the same noise.
VALIDATION_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroBatch:
    """What one forward pass takes.

    Attributes:
        plan: The rows.
        indices: int64 `[B]`: global indices of the samples; in validation, indices in the set, each
            sample once for each phase that it goes through.
        is_sequential: bool `[B]`: the phase of each sample.
    """

    plan: RowPlan
    indices: NDArray[np.int64]
    is_sequential: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepPlan:
    """What a rank takes a step with.

    Attributes:
        micro_batches: This rank's micro-batches; as many on every rank.
        tokens: Real tokens of each phase in the global batch, the same on every rank: the
            denominators of the loss.
    """

    micro_batches: list[MicroBatch]
    tokens: PhaseTokens

    def pin_memory(self) -> Self:
        """Returns the plan with its tensors in pinned memory."""
        pinned = [replace(batch, plan=batch.plan.pin_memory()) for batch in self.micro_batches]
        return replace(self, micro_batches=pinned)


class TrainingBatches:
    """The micro-batches of every step, as a function of the samples consumed before it.

    Args:
        config: The resolved configuration.
        data: The training shards.
        data_parallel_size: Number of data-parallel ranks.

    Raises:
        ConfigError: The global batch cannot be dealt evenly, or the tokenizer lacks the tokens of
            the framing.
    """

    def __init__(self, config: Config, data: TrainingData, data_parallel_size: int) -> None:
        train = config.train
        self.config = config
        self.data = data
        self.length = config.data.sequence_length
        self.framing = Framing.resolve(config.data, data.tokenizer)
        self.dealing = Dealing(
            train.global_batch_size,
            train.micro_batch_size,
            data_parallel_size,
            config.objective.batch_split,
        )

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
            phase=self.config.data.phase,
            source=source,
        )

    def plan_step(self, consumed_samples: int, data_parallel_rank: int) -> StepPlan:
        """Read and plan all micro-batches of one rank's step; no communication.

        Raises:
            DataError: A shard is damaged.
        """
        config = self.config
        length_N = draw_lengths(
            config.run.seed,
            consumed_samples + np.arange(config.train.global_batch_size),
            config.data.ssl_ratio,
            self.length,
        )
        return StepPlan(
            micro_batches=[
                self._plan(consumed_samples, places, length_N[places])
                for places in self.dealing.micro_batches(data_parallel_rank)
            ],
            tokens=count_phase_tokens(self.dealing, length_N),
        )

    def _plan(
        self, first_index: int, places: NDArray[np.int64], length_B: NDArray[np.int64]
    ) -> MicroBatch:
        config, seed = self.config, self.config.run.seed
        indices = first_index + places
        is_sequential = self.dealing.is_sequential(places)
        t = diffusion_times(
            seed, first_index, self.dealing, places, sampling_eps=config.objective.sampling_eps
        )
        alpha_0 = config.objective.alpha_0
        noise = draw_noise(seed, indices, is_sequential, t, alpha_0, self.length, length_B=length_B)
        plan = plan_rows(
            self.framing.frame(self.data.rows(indices)),
            noise,
            schedule=LogLinearSchedule(alpha_0),
            loss_type=config.objective.loss_type,
            mask_token_id=self.data.mask_token_id,
            row_multiple=row_multiple(config),
        )
        return MicroBatch(plan=plan, indices=indices, is_sequential=is_sequential)


def plan_validation(
    config: Config,
    dataset: TokenDataset,
    *,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> Iterator[MicroBatch]:
    """Plan this rank's part of the validation set; the whole is the same on every layout.

    Each sample goes through both phases (through one where alpha_0 is 0 or 1) with ELBO weights;
    times are stratified over the set.
    """
    num_samples = count_validation_samples(config, dataset)
    length, alpha_0 = config.data.sequence_length, config.objective.alpha_0
    phases = [is_sequential for is_sequential in (False, True) if alpha_0 != float(is_sequential)]
    for samples in _split_set(config, num_samples, data_parallel_rank, data_parallel_size):
        times = validation_times(
            VALIDATION_SEED, samples, num_samples, sampling_eps=config.objective.sampling_eps
        )
        indices = np.tile(samples, len(phases))
        noise = draw_noise(
            VALIDATION_SEED,
            indices,
            np.repeat(phases, len(samples)),
            np.tile(times, len(phases)),
            alpha_0,
            length,
            is_validation=True,
        )
        yield _plan_samples(config, dataset, indices, noise)


def plan_any_order(
    config: Config,
    dataset: TokenDataset,
    number: int,
    *,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> Iterator[MicroBatch]:
    """Plan this rank's part of the validation set for exact likelihoods, each in one order.

    Args:
        config: The resolved configuration.
        dataset: The validation shards.
        number: Which of each sample's independent orders.
        data_parallel_rank: This rank.
        data_parallel_size: Number of ranks that share the set.
    """
    length, alpha_0 = config.data.sequence_length, config.objective.alpha_0
    num_samples = count_validation_samples(config, dataset)
    for samples in _split_set(config, num_samples, data_parallel_rank, data_parallel_size):
        noise = draw_any_order(VALIDATION_SEED, samples, number, alpha_0, length)
        yield _plan_samples(config, dataset, samples, noise)


def _split_set(
    config: Config, num_samples: int, data_parallel_rank: int, data_parallel_size: int
) -> Iterator[NDArray[np.int64]]:
    """This rank's samples of the set, by micro-batch."""
    mine = np.arange(data_parallel_rank, num_samples, data_parallel_size)
    size = config.validation.micro_batch_size
    for start in range(0, len(mine), size):
        yield mine[start : start + size]


def _plan_samples(
    config: Config, dataset: TokenDataset, indices: NDArray[np.int64], noise: Noise
) -> MicroBatch:
    """A micro-batch of samples of the set, with ELBO weights."""
    framing = Framing.resolve(config.data, dataset.manifest.tokenizer)
    plan = plan_rows(
        framing.frame(dataset.rows(indices, config.data.row_tokens)),
        noise,
        schedule=LogLinearSchedule(config.objective.alpha_0),
        loss_type="elbo",
        mask_token_id=dataset.mask_token_id,
        row_multiple=row_multiple(config),
    )
    return MicroBatch(plan=plan, indices=indices, is_sequential=noise.is_sequential_B)


def count_validation_samples(config: Config, dataset: TokenDataset) -> int:
    """Rows that validation reads: `validation.num_samples`, or all where it is 0."""
    num_rows = dataset.num_rows(config.data.row_tokens)
    return min(config.validation.num_samples or num_rows, num_rows)


def row_multiple(config: Config) -> int:
    """What the number of rows must divide by: sequence parallelism splits it over the TP ranks."""
    parallel = config.parallel
    return parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
