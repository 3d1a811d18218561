"""The folder `RUN_DIR/checkpoints`: which checkpoints are kept, and which of them `latest` names.

Rank 0 alone changes it. A checkpoint has its name from the rename that publishes it to the one that
takes it away, so that a kill at any instant leaves whole checkpoints under such names only.
"""

import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_eso.config.sections import CheckpointConfig
from megatron_eso.errors import CheckpointError
from megatron_eso.files import sync_path, write_text
from megatron_eso.runs.run_directory import list_checkpoints
from megatron_eso.training.checkpointing.state import read_state_json

LATEST = "latest"
LEFTOVERS = ("step_*.tmp", "step_*.deleting")
GIBI = 2**30

logger = logging.getLogger(__name__)


def begin(partial: Path, num_bytes: int) -> None:
    """Make the empty folder that a checkpoint is written in.

    What killed jobs left of theirs goes first: it may be what fills the disk.

    Raises:
        OSError: The file system refuses, or has less than `num_bytes` left.
    """
    partial.parent.mkdir(parents=True, exist_ok=True)
    for pattern in LEFTOVERS:
        for leftover in partial.parent.glob(pattern):
            shutil.rmtree(leftover)
    free = shutil.disk_usage(partial.parent).free
    if free < num_bytes:
        raise OSError(
            f"{partial.parent}: a checkpoint takes {num_bytes / GIBI:.3g} GiB, and "
            f"{free / GIBI:.3g} GiB are free: make room"
        )
    partial.mkdir()


def publish(partial: Path, final: Path, config: CheckpointConfig) -> None:
    """Give a written checkpoint its name, and take those away that are not to be kept."""
    partial.replace(final)
    sync_path(final.parent)
    write_text(final.parent / LATEST, final.name + "\n")
    try:
        remove(set(list_checkpoints(final.parent)) - list_kept(final.parent, config))
    except OSError as error:
        logger.warning("old checkpoints could not be removed: %s", error)


def remove(checkpoints: Iterable[Path]) -> None:
    """Delete checkpoints."""
    for doomed in checkpoints:
        # Renamed first: a half-deleted folder must not look like a checkpoint.
        leftover = doomed.with_suffix(".deleting")
        shutil.rmtree(leftover, ignore_errors=True)
        doomed.replace(leftover)
        shutil.rmtree(leftover)


def list_kept(folder: Path, config: CheckpointConfig) -> set[Path]:
    """The last ones, every n-th, the best, and the last one to go back to."""
    steps = list_checkpoints(folder)
    records = {step: _read_record(step) for step in steps}
    kept = set(steps[-config.keep_last :])
    every = config.keep_every
    kept |= {step for step in steps if every and int(step.name[5:]) % every == 0}
    if config.keep_best:
        scores = {step: _read_score(record) for step, record in records.items()}
        best = min(steps, key=scores.__getitem__, default=None)
        kept |= {best} if best is not None and scores[best] < math.inf else set()
    good = [step for step in steps if records[step].get("skipped_in_row") == 0]
    return kept | set(good[-1:])


def _read_record(checkpoint: Path) -> dict[str, Any]:
    """`state.json`; empty where it is damaged, which is found out when it is needed."""
    try:
        return read_state_json(checkpoint)
    except CheckpointError:
        return {}


def _read_score(record: Mapping[str, Any]) -> float:
    """The validation at a checkpoint's step; infinite where it was none, or none to speak of."""
    score = record.get("val_nelbo")
    return score if isinstance(score, float) and math.isfinite(score) else math.inf


def make_newest(valid: Path, damaged: Iterable[Path], unwanted: Iterable[Path]) -> None:
    """Have a checkpoint be the one that the run goes on from.

    Args:
        valid: That one.
        damaged: Of the later ones those to put aside, for whoever wants to look.
        unwanted: Of the later ones those to delete.
    """
    latest = valid.parent / LATEST
    if not latest.exists() or latest.read_text().strip() != valid.name:
        write_text(latest, valid.name + "\n")
    for checkpoint in damaged:
        shutil.rmtree(checkpoint.with_suffix(".damaged"), ignore_errors=True)
        checkpoint.replace(checkpoint.with_suffix(".damaged"))
    remove(unwanted)
