"""Decides whether a run fits a GPU's memory, and names what to change first if it does not."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_eso.config.combinations import check_config, check_layout
from megatron_eso.config.sections import Config
from megatron_eso.errors import ConfigError
from megatron_eso.estimates.gpus import GPUS_PER_NODE, Gpu
from megatron_eso.estimates.memory import estimate_memory
from megatron_eso.objectives.objective import Objective
from megatron_eso.quantities import GIB

RUNTIME_BYTES = 3.5 * GIB
"""The CUDA context, kernels and NCCL's buffers of a process. An assumption."""
ALLOCATOR_SHARE = 0.03
"""What the allocator loses to sizes that differ between micro-batches, of all tensors. The same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Memory of the fullest rank against that of a GPU, in bytes."""

    tensors: float
    gpu: Gpu

    @property
    def needed(self) -> float:
        """All that the process needs."""
        return self.tensors * (1 + ALLOCATOR_SHARE) + RUNTIME_BYTES

    @property
    def is_enough(self) -> bool:
        """Whether the GPU has as much."""
        return self.needed <= self.gpu.memory

    def __str__(self) -> str:
        """Return needed and available memory in words."""
        return (
            f"{self.needed / GIB:.1f} of {self.gpu.memory / GIB:.1f} GiB of {self.gpu.name} "
            f"(tensors {self.tensors / GIB:.1f}, CUDA and NCCL {RUNTIME_BYTES / GIB:.1f}, "
            f"allocator {self.tensors * ALLOCATOR_SHARE / GIB:.1f})"
        )


def measure_fit(config: Config, objective: Objective, world_size: int, gpu: Gpu) -> Fit:
    """Compare the estimated memory of the fullest rank with a GPU's.

    Args:
        config: A configuration that `check_layout` accepts, with its vocabulary.
        objective: Its objective.
        world_size: Number of ranks.
        gpu: The GPU of every rank.
    """
    ranks = world_size // config.parallel.model_parallel_size
    estimate = estimate_memory(config, config.data.vocab_size or 0, objective, ranks)
    return Fit(tensors=estimate.total, gpu=gpu)


def find_cure(config: Config, objective: Objective, world_size: int, gpu: Gpu) -> str | None:
    """Return the first of the cures that makes a run fit, as keys to set; None if none does.

    They come in the order of their price: sharding the optimizer costs next to nothing, then come
    smaller micro-batches, recomputation, tensor parallelism within a node, and these together.
    """
    for cured in _list_cures(config):
        try:
            check_config(cured)
            check_layout(cured, world_size)
        except ConfigError:
            continue
        if measure_fit(cured, objective, world_size, gpu).is_enough:
            return describe_changes(config, cured)
    return None


def describe_changes(before: Config, after: Config) -> str:
    """Return the keys of `train` and `parallel` that differ, with their new values."""
    changes = []
    for section in ("train", "parallel"):
        old, new = getattr(before, section), getattr(after, section)
        for field in dataclasses.fields(old):
            value = getattr(new, field.name)
            if value != getattr(old, field.name):
                text = str(value).lower() if isinstance(value, bool) else str(value)
                changes.append(f"{section}.{field.name}={text}")
    return " ".join(changes)


def change_train(config: Config, **values: object) -> Config:
    """Return the configuration with other values in the section `train`."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **values))  # type: ignore[arg-type]


def change_parallel(config: Config, **values: object) -> Config:
    """Return the configuration with other values in the section `parallel`."""
    parallel = dataclasses.replace(config.parallel, **values)  # type: ignore[arg-type]
    return dataclasses.replace(config, parallel=parallel)


def _list_cures(config: Config) -> Iterator[Config]:
    """List the configurations to try, each with one change, and then with several."""

    def shard(each: Config) -> Config:
        return change_parallel(each, use_distributed_optimizer=True)

    def recompute(each: Config) -> Config:
        return change_train(each, recompute_granularity="full")

    sizes = [config.train.micro_batch_size]
    while sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    yield shard(config)
    for size in sizes[1:]:
        yield change_train(config, micro_batch_size=size)
    yield recompute(config)
    for size in sizes:
        yield recompute(shard(change_train(config, micro_batch_size=size)))
    ranks = config.parallel.tensor_model_parallel_size
    while (ranks := 2 * ranks) <= GPUS_PER_NODE:
        for change in (lambda each: each, recompute):
            step: Callable[[Config], Config] = change
            for size in (sizes[0], sizes[-1]):
                smaller = step(shard(change_train(config, micro_batch_size=size)))
                yield change_parallel(
                    smaller, tensor_model_parallel_size=ranks, sequence_parallel=True
                )
