"""Run directories: the network of a checkpoint, and a run directory made from a network."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from checkpoints_conversion.network_fields import build_run_config, describe_network
from checkpoints_conversion.parameter_map import list_keys, map_to_megatron, map_to_sampler
from checkpoints_conversion.sampler_directory import (
    copy_tokenizer,
    hash_tensors,
    new_directory,
    write_json,
)
from megatron_eso.config.loading import config_to_dict, read_config
from megatron_eso.config.sections import Config
from megatron_eso.errors import CheckpointError
from megatron_eso.runs.file_index import INDEX_FILE as FILE_INDEX
from megatron_eso.runs.file_index import describe_file, find_damage, write_index
from megatron_eso.runs.file_index import read_index as read_file_index
from megatron_eso.runs.torch_dist import (
    BACKEND_FILE,
    INDEX_FILE,
    list_shapes,
    read_index,
    read_tensors,
    write_tensors,
)
from megatron_eso.sampler.layers_eso_lm import NetworkConfig

FORMAT_VERSION = 1
STEP_PATTERN = re.compile(r"step_\d{8}")
TOKENIZER = "tokenizer"
SAMPLER_OBJECTIVES = ("eso_lm",)
"""Objectives whose network the sampler has."""
EMA_PREFIX = "ema."
MAIN_PREFIXES = ("optimizer.state.fp32_param.", "optimizer.state.param.", "")
"""Where the float32 main parameters may be; the model's own tensors come last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete distributed checkpoint."""

    directory: Path
    config: Config
    step: int
    index: Metadata

    @property
    def tokenizer(self) -> Path | None:
        """The run's tokenizer, where it has one."""
        tokenizer = self.directory.parent.parent / TOKENIZER
        return tokenizer if tokenizer.is_dir() else None

    @property
    def has_ema(self) -> bool:
        """Whether it holds a moving average of the weights."""
        return any(key.startswith(EMA_PREFIX) for key in list_shapes(self.index))


def is_checkpoint(directory: Path) -> bool:
    """Whether this is a distributed checkpoint itself."""
    return (directory / BACKEND_FILE).is_file() and (directory / INDEX_FILE).is_file()


def open_checkpoint(path: str | Path, step: int | None = None) -> Checkpoint:
    """Find and describe a checkpoint.

    Args:
        path: a run directory, or a `step_XXXXXXXX` directory.
        step: which one; default the one that `checkpoints/latest` names.

    Raises:
        CheckpointError: there is none, it is damaged, or its format version is unknown.
        ConfigError: its configuration is damaged or of another version.
    """
    directory = _find_checkpoint(Path(path), step)
    if (directory / FILE_INDEX).exists():  # checkpoints of other programs have none
        for problem in find_damage(directory, read_file_index(directory)):
            raise CheckpointError(f"{problem}; take another checkpoint than {directory}")
    state = _read_state(directory / "state.json")
    return Checkpoint(
        directory=directory,
        config=read_config(directory / "config.json"),
        step=state["step"],
        index=read_index(directory),
    )


def _find_checkpoint(path: Path, step: int | None) -> Path:
    if step is None and is_checkpoint(path):
        return path
    checkpoints = path / "checkpoints"
    if step is not None:
        directory = checkpoints / f"step_{step:08d}"
    else:
        latest = checkpoints / "latest"
        try:
            name = latest.read_text(encoding="utf-8").strip()
        except OSError:
            raise CheckpointError(
                f"{latest}: not found; give a run directory with a complete checkpoint"
            ) from None
        if not STEP_PATTERN.fullmatch(name):
            raise CheckpointError(f"{latest}: names {name!r}, no checkpoint; use --step")
        directory = checkpoints / name
    if not is_checkpoint(directory):
        found = sorted(entry.name for entry in checkpoints.glob("step_*") if is_checkpoint(entry))
        raise CheckpointError(f"{directory}: no complete checkpoint; there are {found or 'none'}")
    return directory


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); give another checkpoint"
        ) from None
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is unknown, this version reads {FORMAT_VERSION}; use the "
            "release that wrote it"
        )
    if not isinstance(state.get("step"), int):
        raise CheckpointError(f"{path}: has no step; give another checkpoint")
    return state


def check_objective(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of an objective whose network the sampler does not have.

    Raises:
        CheckpointError: `objective.name` is another one.
    """
    name = checkpoint.config.objective.name
    if name not in SAMPLER_OBJECTIVES:
        raise CheckpointError(
            f"{checkpoint.directory / 'config.json'}: objective.name = {name}: the sampler knows "
            f"{', '.join(SAMPLER_OBJECTIVES)} only; evaluate this run with python -m "
            f"pretrain.evaluate"
        )


def read_network(
    checkpoint: Checkpoint, weights: str | None
) -> tuple[NetworkConfig, dict[str, Tensor], dict[str, Any]]:
    """The network, its tensors by the sampler's names, and what `config.json` says of them.

    Nothing of it depends on the layout of the run that wrote the checkpoint.

    Args:
        checkpoint: where from.
        weights: `ema` or `raw`; by default EMA where there is one.

    Raises:
        CheckpointError: there are no such weights, a tensor is missing, damaged or of another
            shape, or the sampler does not know the run's objective.
    """
    check_objective(checkpoint)
    config = describe_network(checkpoint.config, checkpoint.directory / "config.json")
    if weights is None:
        weights = "ema" if checkpoint.has_ema else "raw"
    if weights == "ema" and not checkpoint.has_ema:
        raise CheckpointError(f"{checkpoint.directory}: has no EMA weights; use --weights raw")
    residual_gates = checkpoint.config.model.residual_gates
    shapes = list_shapes(checkpoint.index)
    prefixes = (EMA_PREFIX,) if weights == "ema" else MAIN_PREFIXES
    stored = {}
    for key in list_keys(config, residual_gates=residual_gates):
        candidates = [prefix + key for prefix in prefixes]
        stored[key] = next((name for name in candidates if name in shapes), candidates[-1])
    found = read_tensors(checkpoint.directory, checkpoint.index, stored.values())
    tensors = {key: found[name] for key, name in stored.items()}
    description = {
        **asdict(config),
        "alpha_0": checkpoint.config.objective.alpha_0,
        "variant": checkpoint.config.objective.variant,
        "source": {
            "kind": "megatron",
            "step": checkpoint.step,
            "weights": weights,
            "sha256": hash_tensors(tensors),
        },
    }
    return config, map_to_sampler(config, tensors, residual_gates=residual_gates), description


def write_run_directory(
    directory: str | Path,
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer: Path | None,
) -> None:
    """Write a run directory whose one checkpoint, of step 0, holds the weights of a network.

    `pretrain.train` starts from it by `checkpoint.init_from`. It appears complete or not at all.

    Args:
        directory: must not exist, or be empty.
        description: content of a sampler's `config.json`.
        tensors: by the sampler's names.
        tokenizer: a file or directory, or None.

    Raises:
        CheckpointError: the directory exists, or Megatron-Core has no such network.
        DataError: the tokenizer is damaged.
    """
    network = NetworkConfig.from_dict(description)
    config = build_run_config(network, description, str(directory))
    padded_vocab_size = config.model.pad_vocabulary(network.vocab_size)
    state = {"format_version": FORMAT_VERSION, "step": 0, "consumed_samples": 0, "kind": "weights"}
    with new_directory(directory) as partial:
        checkpoint = partial / "checkpoints" / "step_00000000"
        checkpoint.mkdir(parents=True)
        write_tensors(
            checkpoint, map_to_megatron(network, tensors, padded_vocab_size=padded_vocab_size)
        )
        for folder in (partial, checkpoint):
            write_json(folder / "config.json", config_to_dict(config))
        write_json(checkpoint / "state.json", state)
        write_index(checkpoint, {file.name: describe_file(file) for file in checkpoint.iterdir()})
        if tokenizer is not None:
            (partial / TOKENIZER).mkdir()
            copy_tokenizer(tokenizer, partial / TOKENIZER, description)
        (partial / "checkpoints" / "latest").write_text(checkpoint.name + "\n", encoding="utf-8")
