"""The folder `RUN_DIR/checkpoints`: publishing, keeping and removing of checkpoints.

Only rank 0 changes the folder. A rename publishes a checkpoint, and another rename takes its name
away before its files are removed. A kill at any instant therefore leaves only complete checkpoints
under their names.
"""

import logging
import math
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_eso.config.sections import CheckpointConfig
from megatron_eso.errors import CheckpointError
from megatron_eso.files import remove_folder, rename
from megatron_eso.quantities import GIB
from megatron_eso.runs.checkpoint_state import CheckpointState, read_checkpoint_state
from megatron_eso.runs.steps import LATEST, list_checkpoints, step_number, write_latest

LEFTOVERS = ("step_*.tmp", "step_*.deleting")

logger = logging.getLogger(__name__)


def begin(partial: Path, num_bytes: int) -> None:
    """Make the empty folder of a new checkpoint.

    The unfinished checkpoints of killed jobs are removed first, because they may fill the disk.

    Args:
        partial: The folder to make.
        num_bytes: Expected size of the checkpoint.

    Raises:
        OSError: The file system refuses, or less than `num_bytes` are free.
    """
    partial.parent.mkdir(parents=True, exist_ok=True)
    for pattern in LEFTOVERS:
        for leftover in partial.parent.glob(pattern):
            shutil.rmtree(leftover)
    free = shutil.disk_usage(partial.parent).free
    if free < num_bytes:
        raise OSError(
            f"{partial.parent}: a checkpoint takes {num_bytes / GIB:.3g} GiB, and "
            f"{free / GIB:.3g} GiB are free: make room"
        )
    partial.mkdir()


def publish(partial: Path, final: Path, config: CheckpointConfig) -> None:
    """Give a written checkpoint its name, and remove checkpoints that are no longer kept.

    Args:
        partial: The folder that `begin` made.
        final: The name of the checkpoint.
        config: Which checkpoints to keep.

    Raises:
        OSError: The file system refuses the name.
    """
    rename(partial, final)
    write_latest(final)
    try:
        remove(set(list_checkpoints(final.parent)) - list_kept(final.parent, config))
    except OSError as error:
        logger.warning("old checkpoints could not be removed: %s", error)


def remove(checkpoints: Iterable[Path]) -> None:
    """Delete checkpoints; each loses its name before its files are deleted."""
    for checkpoint in checkpoints:
        remove_folder(checkpoint, checkpoint.with_suffix(".deleting"))


def list_kept(folder: Path, config: CheckpointConfig) -> set[Path]:
    """Return the checkpoints to keep: last, every n-th, best, and last with an applied update."""
    steps = list_checkpoints(folder)
    records = {step: _read_record(step) for step in steps}
    kept = set(steps[-config.keep_last :])
    every = config.keep_every
    kept |= {step for step in steps if every and step_number(step) % every == 0}
    if config.keep_best:
        scores = {step: _read_score(record) for step, record in records.items()}
        best = min(steps, key=scores.__getitem__, default=None)
        kept |= {best} if best is not None and scores[best] < math.inf else set()
    good = [step for step in steps if _is_good(records[step])]
    return kept | set(good[-1:])


def _read_record(checkpoint: Path) -> CheckpointState | None:
    """Read `state.json`; return None where it is damaged, which its readers report."""
    try:
        return read_checkpoint_state(checkpoint)
    except CheckpointError:
        return None


def _is_good(record: CheckpointState | None) -> bool:
    """Return whether the last update before the checkpoint was applied."""
    return record is not None and record.kind == "training" and record.counters.skipped_in_row == 0


def _read_score(record: CheckpointState | None) -> float:
    """Return the NELBO at a checkpoint's step; infinite without a finite one."""
    score = None if record is None else record.val_nelbo
    return score if isinstance(score, float) and math.isfinite(score) else math.inf


def make_newest(valid: Path, damaged: Iterable[Path], unwanted: Iterable[Path]) -> None:
    """Make a checkpoint the newest one, from which the run continues.

    Args:
        valid: The checkpoint.
        damaged: Later checkpoints to rename to `*.damaged`.
        unwanted: Later checkpoints to delete.

    Raises:
        OSError: The file system refuses.
    """
    latest = valid.parent / LATEST
    if not latest.exists() or latest.read_text().strip() != valid.name:
        write_latest(valid)
    for checkpoint in damaged:
        shutil.rmtree(checkpoint.with_suffix(".damaged"), ignore_errors=True)
        rename(checkpoint, checkpoint.with_suffix(".damaged"))
    remove(unwanted)
