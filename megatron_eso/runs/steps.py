"""The checkpoints of a run by step: their names, which there are, and which one is the newest.

`folder` is `RUN_DIR/checkpoints` throughout. A checkpoint gets its name `step_XXXXXXXX` once it is
complete, and keeps it until it is removed.
"""

from pathlib import Path

from megatron_eso.files import write_text

LATEST = "latest"
"""Names the newest checkpoint, for people; no part of this package reads it."""
_PREFIX = "step_"


def step_name(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"{_PREFIX}{step:08d}"


def step_number(checkpoint: Path) -> int:
    """Return the step of a checkpoint by its name."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def list_checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints, oldest first."""
    return sorted(folder.glob(_PREFIX + "[0-9]" * 8))


def newest(folder: Path) -> Path | None:
    """Return the complete checkpoint of the highest step; None where there is none."""
    return max(list_checkpoints(folder), default=None)


def is_checkpoint(path: Path) -> bool:
    """Whether a path is that of a complete checkpoint, by its name."""
    return path.is_dir() and path.resolve() in list_checkpoints(path.resolve().parent)


def find_step(folder: Path, step: int | None) -> Path | None:
    """Return the complete checkpoint of a step, by default the newest; None where there is none."""
    if step is None:
        return newest(folder)
    checkpoint = folder / step_name(step)
    return checkpoint if checkpoint.exists() else None


def write_latest(checkpoint: Path) -> None:
    """Have `latest` name a checkpoint; on disk when this returns."""
    write_text(checkpoint.parent / LATEST, checkpoint.name + "\n")
