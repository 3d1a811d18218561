"""Small training runs inside a process group, for the tests of the parallel parts.

The functions at the end run on every rank of `world.run`; they import megatron themselves.
"""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_eso.config.combinations import with_vocabulary
from megatron_eso.config.loading import load_config
from megatron_eso.config.sections import Config
from megatron_eso.data.samples.training_data import TrainingData
from megatron_eso.data.shards.reader import TokenDataset
from tests.support.planning import objective_of

PARALLEL = "parallel."
TP2 = {"parallel.tensor_model_parallel_size": 2}
PP2 = {"parallel.pipeline_model_parallel_size": 2}
INTERLEAVED = PP2 | {
    "parallel.virtual_pipeline_model_parallel_size": 2,
    "parallel.overlap_p2p_comm": "true",
    "parallel.batch_p2p_comm": "false",
}
DISTRIBUTED = {"parallel.use_distributed_optimizer": "true"}
OVERLAPPED = DISTRIBUTED | {
    "parallel.overlap_grad_reduce": "true",
    "parallel.overlap_param_gather": "true",
}

Overrides = dict[str, Any]

LAYOUTS: dict[str, tuple[int, Overrides]] = {
    "1 rank": (1, {}),
    "TP=2": (2, TP2),
    "TP=2 SP": (2, TP2 | {"parallel.sequence_parallel": "true"}),
    "PP=2": (2, PP2),
    "PP=2 interleaved": (2, INTERLEAVED),
    "DP=2": (2, {}),
    "DP=2 distributed optimizer": (2, DISTRIBUTED),
    "TP=2 PP=2": (4, TP2 | PP2),
}

TINY: Overrides = {
    "model.num_layers": 4,
    "model.hidden_size": 32,
    "model.num_attention_heads": 4,
    "data.sequence_length": 24,
    "train.num_steps": 5,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
    "train.log_interval": 1,
    "checkpoint.keep_last": 100,
    "objective.alpha_0": 0.25,
    "optimizer.learning_rate": 1e-2,
    "optimizer.adam_eps": 1e-6,
    "optimizer.ema_decay": 0.99,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run gave: numbers of every step, and the folder of its last checkpoint."""

    losses: list[float]
    grad_norms: list[float]
    checkpoint: Path


def tiny_arguments(run: Path, data: Path, overrides: Overrides) -> list[str]:
    """The command line of a small run."""
    paths = {
        "run.directory": f'"{run}"',
        "data.train": f'"{data / "train"}"',
        "data.validation": f'"{data / "validation"}"',
    }
    return [f"{key}={value}" for key, value in (paths | TINY | overrides).items()]


def tiny_config(run: Path, data: Path, overrides: Overrides) -> Config:
    """The configuration of a small run, with the vocabulary of its data."""
    config = load_config(tiny_arguments(run, data, overrides)).config
    dataset = TokenDataset.open(data / "train")
    return with_vocabulary(
        config,
        vocab_size=dataset.vocab_size,
        mask_token_id=dataset.mask_token_id,
        source=str(data),
    )


def train_tiny(run: Path, data: Path, overrides: Overrides, num_steps: int) -> Trained:
    """Train until `num_steps` steps are taken, from the newest checkpoint if there is one; save."""
    from megatron_eso.training.distributed.cpu_backend import install_cpu_backend

    install_cpu_backend()
    from megatron_eso.training.checkpointing.checkpoints import Checkpoints
    from megatron_eso.training.checkpointing.restore import restore
    from megatron_eso.training.distributed.parallel import model_parallel_groups
    from megatron_eso.training.steps.prefetch import StepPrefetcher
    from megatron_eso.training.steps.train_state import build_train_state

    config = tiny_config(run, data, overrides)
    losses, grad_norms = [], []
    with model_parallel_groups(config.parallel) as groups:
        batches = open_batches(config, groups)
        state = build_train_state(config, groups)
        checkpoints = Checkpoints(run / "checkpoints", config.checkpoint, batches)
        restore(state, config, checkpoints)
        prefetcher = StepPrefetcher(batches, groups.dp.rank(), config.data.prefetch_steps)
        with prefetcher:
            while state.counters.step < num_steps:
                result = take_step(config, state, batches, groups, prefetcher)
                losses.append(result.loss)
                grad_norms.append(result.grad_norm)
        checkpoint = checkpoints.save(state, config, groups)
    return Trained(losses=losses, grad_norms=grad_norms, checkpoint=checkpoint)


def open_batches(config: Config, groups: Any) -> Any:
    """The batches of a small run, with its objective."""
    from megatron_eso.training.steps.batches import TrainingBatches

    data = TrainingData.open(config.data, config.run.seed)
    return TrainingBatches(config, objective_of(config), data, groups.dp.size())


def take_step(config: Config, state: Any, batches: Any, groups: Any, prefetcher: Any = None) -> Any:
    """One training step from where the state stands; its batch is planned now, or taken."""
    from megatron_eso.training.steps.step import train_step

    step = batches.step(state.counters.step, state.counters.consumed_samples)
    return train_step(
        state,
        prefetcher.take(step) if prefetcher else batches.plan_step(step, groups.dp.rank()),
        batches.objective,
        config.train,
        groups,
        flops_per_token=1.0,
        dropout_seed=config.run.seed if config.model.hidden_dropout > 0 else None,
    )


def read_checkpoint(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a distributed checkpoint, whole, by its global name."""
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors
