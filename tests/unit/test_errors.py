"""Commands that are interrupted, or whose output has no reader, end without a traceback."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_eso.runs.run_directory import RunDirectory

# A shell starts background processes with SIGINT ignored.
INTERRUPTED = """
import os, signal
from megatron_eso.errors import run_command
signal.signal(signal.SIGINT, signal.default_int_handler)
run_command(lambda argv: os.kill(os.getpid(), signal.SIGINT))
"""
BROKEN_SOCKET = """
import socket
from megatron_eso.errors import run_command
def main(argv):
    ours, theirs = socket.socketpair()
    theirs.close()
    ours.send(b"x")
run_command(main)
"""
INTERRUPTED_RUN = """
import os, signal, sys
from pathlib import Path
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.training.guards.stop import REASONS, StopRequests
with StopRequests(RunDirectory(Path(sys.argv[1])), 0.0) as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    print(REASONS[stop.received()], flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("still there")
"""


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", *arguments], capture_output=True, text=True, check=False
    )


def test_an_interrupted_command_has_no_traceback() -> None:
    ended = run_python(INTERRUPTED)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_a_broken_socket_is_a_bug_as_before() -> None:
    ended = run_python(BROKEN_SOCKET)
    assert ended.returncode == 1
    assert "BrokenPipeError" in ended.stderr


@pytest.mark.parametrize("options", [[], ["--watch", "0.01"]])
def test_status_ends_where_nobody_reads_it(tmp_path: Path, options: list[str]) -> None:
    run = RunDirectory(tmp_path)
    run.write_status("running", 3)
    command = [sys.executable, "-m", "pretrain.status", str(run.path), *options]
    status = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert status.stdout is not None
    assert status.stderr is not None
    status.stdout.close()
    assert status.stderr.read() == b""
    assert status.wait() == -signal.SIGPIPE


def test_the_first_ctrl_c_saves_and_the_second_ends_at_once(tmp_path: Path) -> None:
    ended = run_python(INTERRUPTED_RUN, str(tmp_path))
    assert ended.returncode == -signal.SIGINT
    assert ended.stdout == "SIGINT\n"
    assert ended.stderr == (
        "interrupted: the run saves after this step; Ctrl-C again ends it without saving\n"
    )
