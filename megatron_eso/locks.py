"""Locks between processes: `flock` on a file, which the kernel releases when the holder ends."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_eso.errors import UserError

_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Lock:
    """The result of an attempt to take a lock.

    Attributes:
        is_held: Whether this process has the lock now.
        holder: The description that the holder wrote into the file; empty if it wrote none.
    """

    is_held: bool
    holder: str = ""


@contextmanager
def hold_lock(
    path: Path, *, shared: bool = False, wait: bool = False, holder: str = ""
) -> Iterator[Lock]:
    """Lock a file while the body runs. Threads of one process exclude each other too.

    Args:
        path: The lock file. It and its folder are created where they are missing, and stay.
        shared: Share the lock with other holders that share it.
        wait: Wait until the lock is free; an interrupt from the keyboard ends the wait.
        holder: A description of this process, which a refused process can read.

    Yields:
        Whether this process holds the lock, and who holds it otherwise. The caller must check
        `is_held`, unless it waits.

    Raises:
        UserError: The file system gives no locks.
    """
    with _open_locked(path, shared=shared, wait=wait) as (stream, is_held):
        if not is_held:
            stream.seek(0)
            yield Lock(is_held=False, holder=stream.read().strip())
            return
        if holder:
            stream.truncate(0)
            stream.write(holder)
            stream.flush()
        yield Lock(is_held=True, holder=holder)


def try_lock(stream: IO[Any], *, shared: bool = False) -> bool:
    """Lock an open file until it is closed or this process ends.

    Args:
        stream: Open for reading and writing.
        shared: Share the lock with other holders that share it.

    Returns:
        Whether the lock is held; False if another process or thread holds it.

    Raises:
        UserError: The file system gives no locks.
    """
    try:
        fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"the file system of {stream.name} gives no locks ({error.strerror}); "
            "use another, or mount it with locks (Lustre: -o flock)"
        ) from error
    return True


@contextmanager
def _open_locked(path: Path, *, shared: bool, wait: bool) -> Iterator[tuple[IO[str], bool]]:
    """Open the lock file and try to lock it; yield the stream and whether it is locked."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            if path.parent.exists() and not path.parent.is_dir():
                raise
            continue  # another process has just renamed the folder
        try:
            # Network file systems need write access for an exclusive lock, and read access for a
            # shared one.
            stream = path.open("a+", encoding="utf-8")
        except FileNotFoundError:
            continue  # another process has just renamed the folder
        with stream:
            is_held = try_lock(stream, shared=shared)
            # Polled, so that an interrupt from the keyboard takes effect.
            while wait and not is_held:
                time.sleep(_POLL_SECONDS)
                is_held = try_lock(stream, shared=shared)
            if is_held and not _is_at(stream, path):
                continue  # the last holder removed the file: another process cannot see this lock
            yield stream, is_held
            return


def _is_at(stream: IO[Any], path: Path) -> bool:
    """Return whether an open file is the one that has the name `path` now."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False
