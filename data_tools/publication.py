"""Directories that appear whole or not at all."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_eso.errors import ConfigError, DataError
from megatron_eso.files import sync_path

_LOCK_FILE = "lock"


@contextlib.contextmanager
def publish_directory(out: Path) -> Iterator[Path]:
    """Give an empty directory to fill, which takes the name `out` once that is done.

    What an interrupted run has left behind is removed; a run that is alive is not disturbed. The
    body brings its files to the disk itself.

    Raises:
        ConfigError: `out` exists already.
        DataError: another process is at it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists already; remove it or give another directory")
    building = out.with_name(f"{out.name}.building")
    building.mkdir(parents=True, exist_ok=True)
    with (building / _LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process is writing {building}; wait for it") from error
        try:
            _empty(building)
            yield building
        except Exception:
            shutil.rmtree(building)
            raise
        (building / _LOCK_FILE).unlink()
        sync_path(building)
        building.rename(out)
        sync_path(out.parent)


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != _LOCK_FILE:
            entry.unlink()
