"""From sample indices to the row plans of a step: the same on every rank, with no broadcast."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eso.config import Config
from megatron_eso.data.order import ORDER_VERSION, SampleOrder
from megatron_eso.data.reader import TokenDataset
from megatron_eso.diffusion.dealing import Dealing
from megatron_eso.diffusion.loss import PhaseTokens, count_phase_tokens
from megatron_eso.diffusion.noise import (
    Noise,
    diffusion_times,
    draw_any_order,
    draw_noise,
    validation_times,
)
from megatron_eso.diffusion.random import NOISE_VERSION
from megatron_eso.diffusion.rows import RowPlan, plan_rows
from megatron_eso.diffusion.schedule import LogLinearSchedule

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


class TrainingBatches:
    """The micro-batches of every step, as a function of the samples consumed before it.

    Args:
        config: The resolved configuration.
        dataset: The training shards.
        data_parallel_size: Number of data-parallel ranks.

    Raises:
        ConfigError: The global batch cannot be dealt evenly.
    """

    def __init__(self, config: Config, dataset: TokenDataset, data_parallel_size: int) -> None:
        train = config.train
        self.config = config
        self.dataset = dataset
        self.length = config.data.sequence_length
        self.order = SampleOrder(config.run.seed, dataset.num_rows(self.length))
        self.dealing = Dealing(
            train.global_batch_size,
            train.micro_batch_size,
            data_parallel_size,
            config.objective.batch_split,
        )

    @property
    def phase_tokens(self) -> PhaseTokens:
        """Real tokens of each phase in a step: the denominators of the loss."""
        return count_phase_tokens(self.dealing, self.length)

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must find unchanged for its samples and their noise to be the same."""
        return {
            "dataset_id": self.dataset.dataset_id,
            "order_version": ORDER_VERSION,
            "noise_version": NOISE_VERSION,
        }

    def plan_step(self, consumed_samples: int, data_parallel_rank: int) -> list[MicroBatch]:
        """Read and plan all micro-batches of one rank's step; no communication.

        Raises:
            DataError: A shard is damaged.
        """
        return [
            self._plan(consumed_samples, places)
            for places in self.dealing.micro_batches(data_parallel_rank)
        ]

    def _plan(self, first_index: int, places: NDArray[np.int64]) -> MicroBatch:
        config, seed = self.config, self.config.run.seed
        indices = first_index + places
        is_sequential = self.dealing.is_sequential(places)
        t = diffusion_times(
            seed, first_index, self.dealing, places, sampling_eps=config.objective.sampling_eps
        )
        alpha_0 = config.objective.alpha_0
        noise = draw_noise(seed, indices, is_sequential, t, alpha_0, self.length)
        plan = plan_rows(
            self.dataset.rows(self.order.rows(indices), self.length),
            noise,
            schedule=LogLinearSchedule(alpha_0),
            loss_type=config.objective.loss_type,
            mask_token_id=self.dataset.mask_token_id,
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
    plan = plan_rows(
        dataset.rows(indices, config.data.sequence_length),
        noise,
        schedule=LogLinearSchedule(config.objective.alpha_0),
        loss_type="elbo",
        mask_token_id=dataset.mask_token_id,
        row_multiple=row_multiple(config),
    )
    return MicroBatch(plan=plan, indices=indices, is_sequential=noise.is_sequential_B)


def count_validation_samples(config: Config, dataset: TokenDataset) -> int:
    """Rows that validation reads: `validation.num_samples`, or all where it is 0."""
    num_rows = dataset.num_rows(config.data.sequence_length)
    return min(config.validation.num_samples or num_rows, num_rows)


def row_multiple(config: Config) -> int:
    """What the number of rows must divide by: sequence parallelism splits it over the TP ranks."""
    parallel = config.parallel
    return parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
