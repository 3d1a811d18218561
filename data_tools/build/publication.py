"""Directories that appear whole or not at all, and the locks of those who write them."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megatron_eso.errors import ConfigError, DataError
from megatron_eso.files import sync_path

LOCK_FILE = "lock"


def try_lock(file: IO[bytes], *, shared: bool = False) -> bool:
    """Lock an open file until it is closed or this process ends; False: others have it."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise DataError(
            f"the file system of {file.name} gives no locks ({error.strerror}); "
            "build on another, or mount it with locks (Lustre: -o flock)"
        ) from error
    return True


@contextlib.contextmanager
def lock_directory(directory: Path, *, shared: bool = False) -> Iterator[None]:
    """Make a directory if need be and keep other writers out of it.

    Args:
        directory: to write.
        shared: let in others that ask for a shared lock.

    Raises:
        DataError: another process is at it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # To read and write: network file systems want that for shared and exclusive locks.
    with (directory / LOCK_FILE).open("a+b") as lock:
        if not try_lock(lock, shared=shared):
            raise DataError(f"another process is writing {directory}; wait for it")
        yield


def check_absent(out: Path) -> None:
    """Refuse a place that holds something.

    Raises:
        ConfigError: `out` is there and is no empty directory.
    """
    if is_taken(out):
        raise ConfigError(f"--out {out} exists already; remove it or give another directory")


def is_taken(out: Path) -> bool:
    """Whether there is something other than an empty directory."""
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def building_directory(out: Path) -> Path:
    """Where `out` is made."""
    return out.with_name(f"{out.name}.building")


@contextlib.contextmanager
def publish_directory(out: Path) -> Iterator[Path]:
    """Give an empty directory to fill, which takes the name `out` once that is done.

    What an interrupted run has left behind is removed; a run that is alive is not disturbed. The
    body brings its files to the disk itself.

    Raises:
        ConfigError: `out` exists already.
        DataError: another process is at it.
    """
    check_absent(out)
    building = building_directory(out)
    with lock_directory(building):
        try:
            empty_directory(building)
            yield building
        except Exception:
            shutil.rmtree(building)
            raise
        (building / LOCK_FILE).unlink()
        sync_path(building)
        building.rename(out)
        sync_path(out.parent)


def empty_directory(directory: Path) -> None:
    """Remove everything in a directory but its lock."""
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK_FILE:
            entry.unlink()
