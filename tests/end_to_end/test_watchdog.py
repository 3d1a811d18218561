"""A rank that freezes in the middle of training: the job ends, and reports which rank it was."""

import re
import signal
import socket
from pathlib import Path

import pytest

from megatron_eso.runs.run_directory import RunDirectory
from tests.support.processes import HANG_SECONDS
from tests.support.torchrun import find_rank, launch, read_log, until_step
from tests.support.training import Overrides

DEADLINE_SECONDS = 30.0
"""Far more than a step takes on a machine however busy."""

OVERRIDES: Overrides = {
    "train.num_steps": 100_000,
    "validation.num_samples": 2,
    "watchdog.step_seconds": DEADLINE_SECONDS,
}


@pytest.mark.slow
def test_a_frozen_rank_ends_the_job_with_its_name(tiny_data: Path, tmp_path: Path) -> None:
    launcher = launch(tmp_path, tiny_data, OVERRIDES)
    until_step(tmp_path, launcher, 3)
    frozen, other = find_rank(launcher, 1), find_rank(launcher, 0)
    frozen.send_signal(signal.SIGSTOP)
    other.wait(HANG_SECONDS)
    # torchrun would kill it only 30 s later, which cannot be set.
    frozen.kill()
    assert launcher.wait(HANG_SECONDS) == 1
    assert RunDirectory(tmp_path).read_status().state == "running"  # it could not write more
    host = re.escape(socket.gethostname())
    for report in (read_log(tmp_path), (tmp_path / "logs" / "rank_00000.log").read_text()):
        assert re.search(
            rf"watchdog: rank 0 on {host} \(process {other.pid}\) has been in "
            r"'train step \d+.*' for \d+ s: ending the job",
            report,
        )
        assert re.search(
            rf"watchdog: rank 1 on {host} \(process {frozen.pid}\): in '.+' for \d+ s, "
            r"SILENT for \d+ s",
            report,
        )
        assert re.search(r'File ".*loop.py", line \d+ in train', report)  # where rank 0 waits
