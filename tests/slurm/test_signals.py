"""What ends a job early reaches the ranks, where Slurm signals only what it has started itself."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.steps import newest, step_number
from tests.support.processes import HANG_SECONDS
from tests.support.slurm_cluster import SlurmCluster
from tests.support.torchrun import read_records
from tests.support.training import tiny_arguments

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "slurm" / "train.sbatch")
NUM_STEPS = 100_000  # more than the test lets it make
SECONDS_BETWEEN_LOOKS = 0.2

pytestmark = pytest.mark.slow


def submit(slurm: SlurmCluster, run: Path, data: Path, launcher: str) -> int:
    run.mkdir(parents=True)
    endless = {"train.num_steps": NUM_STEPS, "checkpoint.interval": NUM_STEPS}
    return slurm.submit(
        *("--nodes=2", "--cpus-per-task=2", f"--output={run}/job.log"),
        *(SCRIPT, *tiny_arguments(run, data, endless)),
        **{
            "PYTHON": sys.executable,
            "PREFLIGHT": "off",
            "LAUNCHER": launcher,
            "SAVE_SECONDS": "600",
        },
        cwd=ROOT,
    )


def read_log(run: Path) -> str:
    path = run / "job.log"
    return path.read_text() if path.exists() else "no log"


def newest_step(run: Path) -> int:
    checkpoint = newest(RunDirectory(run).checkpoints)
    return 0 if checkpoint is None else step_number(checkpoint)


def reached_step(run: Path) -> int:
    return max((record["step"] for record in read_records(run)), default=0)


def until(run: Path, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, read_log(run)[-3000:]
        time.sleep(SECONDS_BETWEEN_LOOKS)


def preempt(slurm: SlurmCluster, _job: int) -> None:
    """Submit a job that takes the nodes; Slurm sends TERM to the steps, and not to the script."""
    urgent = slurm.submit(
        "--nodes=2", "--exclusive", "--partition=urgent", "--output=/dev/null", "--wrap", "true"
    )
    assert slurm.wait(urgent) == "COMPLETED"


def warn_script(slurm: SlurmCluster, job: int) -> None:
    slurm.command("scancel", "--batch", "--signal=USR1", str(job))  # as --signal=B:USR1@300 does


def warn_steps(slurm: SlurmCluster, job: int) -> None:
    slurm.command("scancel", "--signal=USR1", str(job))


def requeue(slurm: SlurmCluster, job: int) -> None:
    slurm.command("scontrol", "requeue", str(job))


def cancel(slurm: SlurmCluster, job: int) -> None:
    slurm.command("scancel", str(job))


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_whatever_ends_the_job_early_the_ranks_save_first(
    slurm: SlurmCluster, tiny_data: Path, tmp_path: Path, launcher: str
) -> None:
    run = tmp_path / "run"
    job = submit(slurm, run, tiny_data, launcher)
    saved: dict[str, int] = {}
    for end in (warn_script, warn_steps, requeue, preempt, cancel):
        start = reached_step(run)
        until(run, lambda start=start: reached_step(run) >= start + 3)
        reached = reached_step(run)
        end(slurm, job)
        if end is cancel:
            assert slurm.wait(job) == "CANCELLED"
        else:
            until(run, lambda reached=reached: newest_step(run) >= reached)
        saved[end.__name__] = newest_step(run) - reached
        assert saved[end.__name__] >= 0, (saved, read_log(run)[-3000:])
    assert slurm.describe(job)["Restarts"] == "4"
    assert not (run / "logs" / "torchrun").exists()  # two files a rank, on the shared file system
