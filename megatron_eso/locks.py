"""Locks between processes: `flock` on a file, or a file that exists while it is held.

The kernel releases a `flock` when the holder ends. Some file systems do not support it.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from megatron_eso.errors import UserError

_POLL_SECONDS = 0.1
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}

logger = logging.getLogger(__name__)


class NoLocksError(UserError):
    """A file system that does not support `flock`."""


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        pid: Number of the process on its host.
        host: Name of the host.
        job: Slurm's number of the job; None outside Slurm.
    """

    pid: int
    host: str
    job: str | None

    def __str__(self) -> str:
        """Describe the process with host and job."""
        suffix = f" of job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{suffix}"

    def to_json(self) -> str:
        """Return the content of a lock file."""
        return json.dumps(asdict(self))

    def is_gone(self) -> bool:
        """Return whether this process has certainly ended.

        The process list decides on the same host. A process of the same job on another host is
        from a start before the last requeue. Another process on another host may still run.
        """
        here = this_process()
        if self.host != here.host:
            return self.job is not None and self.job == here.job
        if self.pid == here.pid:
            return True  # a container gives the same numbers after a restart
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # a process of another user
        return False


def this_process() -> Holder:
    """Return this process as the holder of a lock."""
    return Holder(os.getpid(), socket.gethostname(), os.environ.get("SLURM_JOB_ID") or None)


def parse_holder(text: str) -> Holder | None:
    """Return the holder that a lock file names; None if its content is empty or unknown."""
    try:
        holder = Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None
    return holder if isinstance(holder.pid, int) else None


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
        NoLocksError: The file system gives no locks.
        UserError: `flock` fails for another reason.
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
        NoLocksError: The file system gives no locks.
        UserError: `flock` fails for another reason.
    """
    try:
        fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        kind = NoLocksError if error.errno in _NO_LOCKS else UserError
        raise kind(
            f"the file system of {stream.name} gives no locks ({error.strerror}); "
            "use another, or mount it with locks (Lustre: -o flock)"
        ) from error
    return True


@contextmanager
def hold_file(path: Path) -> Iterator[Lock]:
    """Hold a lock without `flock` while the body runs: the file exists while it is held.

    The file of a holder that has certainly ended is replaced. If two processes replace it in the
    same milliseconds, both may get the lock.

    Args:
        path: The lock file, in a folder that exists. It is removed at the end.

    Yields:
        Whether this process holds the lock, and the content of the file otherwise.
    """
    mine = this_process().to_json()
    while True:
        try:
            with path.open("x", encoding="utf-8") as stream:
                stream.write(mine)
            break
        except FileExistsError:
            found = _read(path)
        holder = parse_holder(found)
        if holder is None or not holder.is_gone():
            yield Lock(is_held=False, holder=found)
            return
        logger.warning("%s: %s has ended: its lock is replaced", path, holder)
        path.unlink(missing_ok=True)
    try:
        yield Lock(is_held=True, holder=mine)
    finally:
        if _read(path) == mine:
            path.unlink(missing_ok=True)


def _read(path: Path) -> str:
    """Return the content of a lock file, empty if the file has just been removed."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


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
