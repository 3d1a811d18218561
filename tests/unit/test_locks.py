"""Locks among processes and threads."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_eso.locks import hold_lock, try_lock
from tests.support.processes import HANG_SECONDS

PROGRAM = """
import pathlib, sys
from megatron_eso.locks import hold_lock
path, is_shared = pathlib.Path(sys.argv[1]), sys.argv[2] == "shared"
with hold_lock(path, shared=is_shared, holder="the other") as lock:
    assert lock.is_held
    print("here", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(path: Path, kind: str = "exclusive") -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        yield process
        process.stdin.close()


def test_a_refused_process_reads_who_has_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "absent" / "lock"
    with hold_lock(path, holder="an earlier, longer description of a holder"):
        pass
    with held_elsewhere(path):
        with hold_lock(path, holder="me") as lock:
            assert not lock.is_held
            assert lock.holder == "the other"
        assert path.read_text() == "the other"
    with hold_lock(path, holder="me") as lock:
        assert lock.is_held
        assert path.read_text() == "me"


def test_shared_locks_keep_out_exclusive_ones(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "lock", "shared"):
        with hold_lock(tmp_path / "lock", shared=True) as lock:
            assert lock.is_held
        with hold_lock(tmp_path / "lock") as lock:
            assert not lock.is_held


def test_a_killed_process_releases_its_lock(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "lock") as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with hold_lock(tmp_path / "lock") as lock:
            assert lock.is_held


def test_a_waiting_thread_gets_the_lock_when_it_is_free(tmp_path: Path) -> None:
    found: list[bool] = []

    def wait() -> None:
        with hold_lock(tmp_path / "lock", wait=True) as lock:
            found.append(lock.is_held)

    with hold_lock(tmp_path / "lock"):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join(HANG_SECONDS)
    assert found == [True]


def test_a_lock_whose_file_was_removed_is_taken_again(tmp_path: Path) -> None:
    """Wait for the lock of a file that is removed, and get that of the new file."""
    path = tmp_path / "lock"
    with hold_lock(path):
        thread = threading.Thread(target=wait_and_write, args=(path,))
        thread.start()
        path.unlink()
    thread.join(HANG_SECONDS)
    assert path.read_text() == "mine"


def wait_and_write(path: Path) -> None:
    with hold_lock(path, wait=True, holder="mine"), hold_lock(path) as lock:
        assert not lock.is_held


def test_an_open_file_is_locked_until_it_is_closed(tmp_path: Path) -> None:
    with (tmp_path / "journal").open("ab") as first, (tmp_path / "journal").open("ab") as second:
        assert try_lock(first)
        assert not try_lock(second)
        first.close()
        assert try_lock(second)
