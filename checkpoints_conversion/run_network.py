"""Reads the network of a run's checkpoint, and writes a run directory from a network."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints_conversion.network_fields import (
    build_run_config,
    describe_network,
    describe_objective,
)
from checkpoints_conversion.parameter_map import list_keys, map_to_megatron, map_to_sampler
from checkpoints_conversion.sampler_directory import (
    copy_tokenizer,
    hash_tensors,
    new_directory,
    write_sorted_json,
)
from megatron_eso.config.loading import config_to_dict
from megatron_eso.errors import CheckpointError
from megatron_eso.runs.checkpoint import EMA_PREFIX, Checkpoint
from megatron_eso.runs.checkpoint_state import STATE_FILE, CheckpointState
from megatron_eso.runs.counters import Counters
from megatron_eso.runs.file_index import describe_file, write_file_index
from megatron_eso.runs.run_directory import CONFIG_FILE, RunDirectory
from megatron_eso.runs.steps import step_name, write_latest
from megatron_eso.runs.torch_dist import list_shapes, read_tensors, write_tensors
from megatron_eso.sampler.network.layers_eso_lm import NetworkConfig

MAIN_PREFIXES = ("optimizer.state.fp32_param.", "optimizer.state.param.", "")
"""Prefixes of the float32 main parameters; the model's own tensors come last."""


def read_network(
    checkpoint: Checkpoint, weights: str | None
) -> tuple[NetworkConfig, dict[str, Tensor], dict[str, Any]]:
    """Return the network, its tensors by the sampler's names, and the content of `config.json`.

    The result does not depend on the layout of the run that wrote the checkpoint.

    Args:
        checkpoint: The checkpoint to read.
        weights: `ema` or `raw`; by default EMA where the checkpoint has it.

    Raises:
        CheckpointError: The checkpoint lacks these weights, a tensor is missing, damaged or of
            another shape.
    """
    # Which network, and which weights of it.
    config = describe_network(checkpoint.config, checkpoint.directory / CONFIG_FILE)
    if weights is None:
        weights = "ema" if checkpoint.has_ema else "raw"
    if weights == "ema" and not checkpoint.has_ema:
        raise CheckpointError(f"{checkpoint.directory}: has no EMA weights; use --weights raw")
    # The name of each tensor in the checkpoint, then its values.
    residual_gates = checkpoint.config.model.residual_gates
    shapes = list_shapes(checkpoint.metadata)
    prefixes = (EMA_PREFIX,) if weights == "ema" else MAIN_PREFIXES
    stored = {}
    for key in list_keys(config, residual_gates=residual_gates):
        candidates = [prefix + key for prefix in prefixes]
        stored[key] = next((name for name in candidates if name in shapes), candidates[-1])
    found = read_tensors(checkpoint.directory, checkpoint.metadata, stored.values())
    tensors = {key: found[name] for key, name in stored.items()}
    description = {
        **asdict(config),
        **describe_objective(checkpoint.config),
        "source": {
            "kind": "megatron",
            "step": checkpoint.step,
            "weights": weights,
            "sha256": hash_tensors(tensors),
        },
    }
    mapped = map_to_sampler(
        config, tensors, residual_gates=residual_gates, source=checkpoint.directory
    )
    return config, mapped, description


def write_run_directory(
    directory: Path,
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer: Path | None,
) -> None:
    """Write a run directory whose one checkpoint, of step 0, holds the weights of a network.

    `pretrain.train` starts from it by `checkpoint.init_from`. It appears complete or not at all.

    Args:
        directory: The directory to write: a new or an empty one.
        description: The content of a sampler's `config.json`.
        tensors: The network's tensors by the sampler's names.
        tokenizer: A tokenizer's file or directory, or None.

    Raises:
        ConfigError: `directory` is not empty, or cannot be written.
        CheckpointError: Megatron-Core has no such network, or the disk is full.
        DataError: The tokenizer is damaged.
    """
    network = NetworkConfig.from_dict(description)
    config = build_run_config(network, description, str(directory))
    padded_vocab_size = config.model.pad_vocabulary(network.vocab_size)
    state = CheckpointState(kind="weights", counters=Counters())
    with new_directory(directory) as partial:
        run = RunDirectory(partial)
        checkpoint = run.checkpoints / step_name(0)
        checkpoint.mkdir(parents=True)
        write_tensors(
            checkpoint, map_to_megatron(network, tensors, padded_vocab_size=padded_vocab_size)
        )
        for folder in (partial, checkpoint):
            write_sorted_json(folder / CONFIG_FILE, config_to_dict(config))
        write_sorted_json(checkpoint / STATE_FILE, state.to_json())
        write_file_index(
            checkpoint, {file.name: describe_file(file) for file in checkpoint.iterdir()}
        )
        if tokenizer is not None:
            run.tokenizer.mkdir()
            copy_tokenizer(tokenizer, run.tokenizer, description)
        write_latest(checkpoint)
