"""A rank that fails ends the job, though its process groups cannot be destroyed."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import HANG_SECONDS

HOST = socket.gethostname()
DAMAGE = "shards/train: shard 3 is damaged"
SHORTAGE = "out of memory before step 1: lower train.micro_batch_size"
ENDS = {
    "loader:1": (DAMAGE, 1, f"stop: failed ({DAMAGE}): correct that and submit again"),
    "step:0": (f"rank 0 on {HOST}: RuntimeError: a kernel failed", 1, "requeue: failed"),
    "save:1": (f"rank 1 on {HOST}: RuntimeError: a save failed", 1, "requeue: failed"),
    "memory in a step:1": (
        f"rank 1 on {HOST}: OutOfMemoryError: CUDA out of memory",
        1,
        "requeue: failed",
    ),
    "memory at the start:0": (SHORTAGE, 2, f"stop: failed ({SHORTAGE})"),
}
"""The line that is reported, the exit code of the rank, and the decision about the run."""

# With a world of one, since each process of a world has the same end.
FAILING_EVALUATION = """
import threading
from datetime import timedelta
import torch.distributed as dist
from megatron_eso.errors import DataError, run_command
from megatron_eso.training.distributed.parallel import process_group
dist.destroy_process_group = lambda *_: threading.Event().wait()
def main(_):
    with process_group(timedelta(minutes=1)):
        raise DataError("shard 3 is damaged")
run_command(main)
"""


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_job(tiny_data: Path, tmp_path: Path) -> None:
    said = subprocess.run(
        [
            *(sys.executable, "-m", "tests.support.failing_ranks"),
            *(str(tiny_data), str(tmp_path), str(HANG_SECONDS), *ENDS),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    for job, line in zip(ENDS, said.stdout.splitlines(), strict=True):
        found, (reported, code, outcome) = json.loads(line), ENDS[job]
        rank = found["rank"]
        assert found["reported"] == [f"rank {rank}: error: {reported}"]
        assert found["codes"][rank] == code
        assert None not in found["codes"]
        assert found["outcome"].startswith(outcome)
        assert reported in found["outcome"]
        log = next(tmp_path.glob(f"*_{rank}/logs/rank_0000{rank}.log")).read_text()
        assert "error: " in log


def test_a_command_that_fails_within_a_process_group_ends() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FAILING_EVALUATION],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert ended.returncode == 1
    assert "error: shard 3 is damaged" in ended.stderr.splitlines()
