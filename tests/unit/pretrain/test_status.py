"""What `pretrain.status` prints of real run directories."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.status import JobFacts, RunStatus, write_status
from pretrain.status import describe_run, read_report


@pytest.fixture
def ended_process() -> int:
    """Return the number of a process of this host that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def describe(path: Path, status: RunStatus) -> str:
    write_status(path / "status.json", status)
    return "\n".join(describe_run(read_report(RunDirectory(path)), time.time()))


def test_a_run_whose_process_is_gone_is_reported_at_once(
    tmp_path: Path, ended_process: int
) -> None:
    running = RunStatus(state="running", step=3)
    assert "process is gone" not in describe(tmp_path, running)
    gone = dataclasses.replace(running, pid=ended_process)
    assert "its process is gone and wrote no reason: read " in describe(tmp_path, gone)
    # Of another host's processes nothing is known, and a run that has ended needs none.
    elsewhere = dataclasses.replace(gone, host="elsewhere")
    assert "process is gone" not in describe(tmp_path, elsewhere)
    assert "process is gone" not in describe(tmp_path, dataclasses.replace(gone, state="finished"))


def test_a_step_past_the_configured_end_is_no_share(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, JobFacts(num_steps=200))
    run.write_status("failed", 260, reason="another seed")
    text = "\n".join(describe_run(read_report(run), time.time()))
    assert "step         260, past train.num_steps = 200" in text
    run.write_status("running", 50)
    text = "\n".join(describe_run(read_report(run), time.time()))
    assert "step         50/200 (25.0 %)" in text
