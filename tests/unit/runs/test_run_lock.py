"""The lock of a run directory among jobs, hosts and file systems without `flock`."""

import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_eso.errors import ConfigError, UserError
from megatron_eso.locks import Holder, parse_holder, this_process
from megatron_eso.runs import run_directory
from megatron_eso.runs.run_directory import RunDirectory

JOB = "17"
HERE = socket.gethostname()
PROGRAM = """
import errno, fcntl, pathlib, sys
from megatron_eso.runs.run_directory import RunDirectory
def refuse(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")
if sys.argv[2] == "without flock":
    fcntl.flock = refuse
with RunDirectory(pathlib.Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setenv("SLURM_JOB_ID", JOB)
    return RunDirectory(tmp_path)


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    break_flock(monkeypatch, errno.ENOSYS)


def break_flock(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)


@contextmanager
def held_elsewhere(run: RunDirectory, kind: str, job: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(run.path), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"SLURM_JOB_ID": job},
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.stdin.close()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_a_file_takes_the_place_of_flock(
    run: RunDirectory,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    break_flock(monkeypatch, code)
    with run.locked():
        assert parse_holder(run.holder_file.read_text()) == this_process()
    assert "gives no locks" in caplog.text
    assert not run.holder_file.exists()


def test_another_error_of_flock_is_one_line(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_flock(monkeypatch, errno.EIO)
    with pytest.raises(UserError, match="Input/output error"), run.locked():
        pass
    assert not run.holder_file.exists()


@pytest.mark.usefixtures("without_flock")
def test_without_flock_a_living_process_is_respected_and_a_killed_one_replaced(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    with held_elsewhere(run, "without flock", "16") as process:
        refusal = f"process {process.pid} on .* of job 16 .*; if it has ended, remove .*holder"
        with pytest.raises(ConfigError, match=refusal), run.locked():
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with run.locked():
            assert parse_holder(run.holder_file.read_text()) == this_process()
    assert f"process {process.pid} on {HERE} of job 16 has ended" in caplog.text


@pytest.mark.usefixtures("without_flock")
@pytest.mark.parametrize(("job", "is_replaced"), [(JOB, True), ("16", False), (None, False)])
def test_without_flock_the_job_decides_about_a_holder_on_another_host(
    run: RunDirectory, job: str | None, is_replaced: bool
) -> None:
    run.holder_file.write_text(Holder(pid=1, host="lost", job=job).to_json())
    with run.try_lock() as lock:
        assert lock.is_held == is_replaced
    assert run.holder_file.exists() != is_replaced


@pytest.mark.usefixtures("without_flock")
@pytest.mark.parametrize("text", ["", "[]", '{"pid": "1", "host": "a", "job": null}'])
def test_without_flock_an_unknown_holder_is_respected(run: RunDirectory, text: str) -> None:
    run.holder_file.write_text(text)
    with pytest.raises(ConfigError, match="another process is running there"), run.locked():
        pass
    assert run.holder_file.read_text() == text


def test_flock_records_its_holder(run: RunDirectory) -> None:
    with held_elsewhere(run, "with flock", "16") as process, run.try_lock() as lock:
        assert parse_holder(lock.holder) == Holder(process.pid, HERE, "16")


def test_a_lock_of_the_same_job_is_waited_for(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    with held_elsewhere(run, "with flock", JOB) as process:

        class Killer(logging.Handler):
            """A handler that ends the holder when the wait is logged."""

            def emit(self, record: logging.LogRecord) -> None:
                process.send_signal(signal.SIGKILL)
                process.wait()

        killer = Killer()
        run_directory.logger.addHandler(killer)
        try:
            with run.locked():
                assert process.returncode == -signal.SIGKILL
        finally:
            run_directory.logger.removeHandler(killer)
    assert "waiting up to 300 s" in caplog.text


def test_the_wait_for_the_same_job_ends_with_one_line(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_directory, "LOST_NODE_SECONDS", 0)
    with (
        held_elsewhere(run, "with flock", JOB) as process,
        pytest.raises(ConfigError, match=f"process {process.pid} on .* of job {JOB}"),
        run.locked(),
    ):
        pass
