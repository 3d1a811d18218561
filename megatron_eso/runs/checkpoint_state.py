"""`state.json` of a checkpoint: its content besides the tensors."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from megatron_eso.errors import CheckpointError
from megatron_eso.runs.counters import Counters, MovingStatistics

STATE_FILE = "state.json"
FORMAT_VERSION = 1
_OPTIONAL = ("ema_updates", "torch_version", "val_nelbo", "noise_version", "init_version", "data")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointState:
    """The state that a checkpoint records, of a training run or of weights alone."""

    kind: Literal["training", "weights"]
    """A checkpoint of `weights` records only step and samples."""
    counters: Counters
    losses: MovingStatistics = field(default_factory=MovingStatistics)
    """Statistics of the losses of applied steps."""
    grad_norms: MovingStatistics = field(default_factory=MovingStatistics)
    """Statistics of the logarithms of the gradient norms of applied steps."""
    ema_updates: int | None = None
    """Updates of the moving average; None where the checkpoint holds no average."""
    torch_version: str | None = None
    val_nelbo: float | None = None
    """NELBO of the validation at this step; None without one."""
    noise_version: int | None = None
    """Version of the noise of the samples."""
    init_version: int | None = None
    """Version of the run's initial weights; None if they were read, or drawn by version 1."""
    data: Mapping[str, Any] | None = None
    """The order of the samples (megatron_eso/data/samples); None where none is recorded."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of `state.json`."""
        content = asdict(self)
        counters: dict[str, Any] = content.pop("counters")
        first = {"format_version": FORMAT_VERSION, "kind": content.pop("kind")}
        if self.kind == "weights":
            return first | {name: counters[name] for name in ("step", "consumed_samples")}
        return {**first, **counters, **content}


def read_checkpoint_state(checkpoint: Path) -> CheckpointState:
    """Read `state.json` of a checkpoint.

    Raises:
        CheckpointError: The file is missing, cannot be read, or has another format version.
    """
    path = checkpoint / STATE_FILE
    try:
        content = json.loads(path.read_text())
        version = content["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _describe_damage(path, error) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {version}, this version reads {FORMAT_VERSION}: "
            f"use the megatron-eso that wrote it"
        )
    try:
        return _parse(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise _describe_damage(path, error) from error


def _describe_damage(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: not readable as a checkpoint's state ({error}); take another checkpoint"
    )


def _parse(content: Mapping[str, Any]) -> CheckpointState:
    if content["kind"] != "training":
        counters = Counters(step=content["step"], consumed_samples=content["consumed_samples"])
        return CheckpointState(kind="weights", counters=counters)
    return CheckpointState(
        kind="training",
        counters=Counters(**{each.name: content[each.name] for each in fields(Counters)}),
        losses=MovingStatistics(**content["losses"]),
        grad_norms=MovingStatistics(**content["grad_norms"]),
        **{name: content[name] for name in _OPTIONAL if name in content},
    )
