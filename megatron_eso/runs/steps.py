"""The checkpoints of a run by step: their names, the complete ones, and the newest one.

In this file `folder` is `RUN_DIR/checkpoints`. A checkpoint gets its name `step_XXXXXXXX` when it
is complete, and keeps it until it is removed.
"""

from pathlib import Path

from megatron_eso.files import write_text

LATEST = "latest"
"""The file that names the newest checkpoint, for people; this package does not read it."""
_PREFIX = "step_"


def step_name(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"{_PREFIX}{step:08d}"


def step_number(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def list_checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints, oldest first."""
    return sorted(folder.glob(_PREFIX + "[0-9]" * 8))


def newest(folder: Path) -> Path | None:
    """Return the complete checkpoint of the highest step; None without any."""
    return max(list_checkpoints(folder), default=None)


def is_checkpoint(path: Path) -> bool:
    """Return whether a path has the name of a complete checkpoint."""
    return path.is_dir() and path.resolve() in list_checkpoints(path.resolve().parent)


def find_step(folder: Path, step: int | None) -> Path | None:
    """Return the complete checkpoint of a step, for None the newest; None where it is missing."""
    if step is None:
        return newest(folder)
    checkpoint = folder / step_name(step)
    return checkpoint if checkpoint.exists() else None


def write_latest(checkpoint: Path) -> None:
    """Write the name of a checkpoint to `latest`; it is on disk when this returns."""
    write_text(checkpoint.parent / LATEST, checkpoint.name + "\n")
