"""Opening of a checkpoint for reading, without a GPU or a process group."""

from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

from megatron_eso.config.loading import read_config
from megatron_eso.config.sections import Config
from megatron_eso.errors import CheckpointError, ConfigError
from megatron_eso.runs.checkpoint_state import CheckpointState, read_checkpoint_state
from megatron_eso.runs.file_index import FILE_INDEX, find_damage, read_file_index
from megatron_eso.runs.run_directory import CONFIG_FILE, RunDirectory
from megatron_eso.runs.steps import find_step, list_checkpoints, step_name
from megatron_eso.runs.torch_dist import is_torch_dist, list_shapes, read_metadata

EMA_PREFIX = "ema."
PREFIXES = {
    "param": "",
    "ema": EMA_PREFIX,
    "exp_avg": "optimizer.state.exp_avg.",
    "exp_avg_sq": "optimizer.state.exp_avg_sq.",
}
"""Prefix of a tensor's name for each kind of state: main parameters, their moving average, Adam's
moments. The model's name of the parameter follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete distributed checkpoint, opened for reading."""

    directory: Path
    config: Config
    state: CheckpointState
    metadata: Metadata
    """The index of the tensors: shapes, dtypes and files."""

    @property
    def step(self) -> int:
        """Steps that the run has taken."""
        return self.state.counters.step

    @property
    def tokenizer(self) -> Path | None:
        """Folder of the run's tokenizer; None without one."""
        tokenizer = RunDirectory(self.directory.parent.parent).tokenizer
        return tokenizer if tokenizer.is_dir() else None

    @property
    def has_ema(self) -> bool:
        """Whether the checkpoint holds a moving average of the weights."""
        return any(key.startswith(EMA_PREFIX) for key in list_shapes(self.metadata))


def open_checkpoint(path: Path, step: int | None = None) -> Checkpoint:
    """Find, check and open a checkpoint.

    Args:
        path: A run directory, or a `step_XXXXXXXX` directory.
        step: The step of the run's checkpoint; by default the newest.

    Raises:
        CheckpointError: The checkpoint is missing or damaged, or its format version is unknown.
        ConfigError: The given step has no checkpoint, or its configuration is damaged or has
            another version.
    """
    directory = _find_checkpoint(path, step)
    if (directory / FILE_INDEX).exists():  # other programs write no index
        for problem in find_damage(directory, read_file_index(directory)):
            raise CheckpointError(f"{problem}; take another checkpoint than {directory}")
    return Checkpoint(
        directory=directory,
        config=read_config(directory / CONFIG_FILE),
        state=read_checkpoint_state(directory),
        metadata=read_metadata(directory),
    )


def _find_checkpoint(path: Path, step: int | None) -> Path:
    if step is None and is_torch_dist(path):
        return path
    folder = RunDirectory(path).checkpoints
    found = find_step(folder, step)
    if found is None or not is_torch_dist(found):
        wanted = found or (folder if step is None else folder / step_name(step))
        complete = [each.name for each in list_checkpoints(folder) if is_torch_dist(each)]
        there = ", ".join(complete) or "none"
        kind = CheckpointError if step is None else ConfigError
        raise kind(f"{wanted}: no complete checkpoint; there are {there}")
    return found
