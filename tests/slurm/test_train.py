"""The job script on real Slurm: two nodes train over gloo; what ends a job does not end the run.

Every job is compared bitwise with the curve of one that nothing happened to.
"""

import contextlib
import itertools
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_eso.runs.run_directory import RunDirectory
from tests.support.processes import HANG_SECONDS
from tests.support.slurm_cluster import SlurmCluster
from tests.support.torchrun import read_records
from tests.support.training import Overrides, tiny_arguments

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "slurm" / "train.sbatch")
NUM_STEPS = 60
SCHEDULE: Overrides = {
    "train.num_steps": NUM_STEPS,
    "checkpoint.interval": 5,
    "validation.interval": 30,
    "validation.num_samples": 8,
    "model.hidden_dropout": 0.1,
    "parallel.use_distributed_optimizer": "true",
}
LOOKS_PER_QUESTION = 50
OPTIONS = ("--nodes=2", "--cpus-per-task=2")

pytestmark = pytest.mark.slow


def submit(
    slurm: SlurmCluster, run: Path, data: Path, overrides: Overrides, **environment: str
) -> int:
    """Start the job script as a user would, from the root of the repository."""
    run.mkdir(parents=True, exist_ok=True)
    return slurm.submit(
        *OPTIONS,
        f"--output={run}/job.log",
        SCRIPT,
        *tiny_arguments(run, data, SCHEDULE | overrides),
        cwd=ROOT,
        **({"PYTHON": sys.executable, "PREFLIGHT": "off"} | environment),
    )


def read_log(run: Path) -> str:
    path = run / "job.log"
    return path.read_text() if path.exists() else "no log"


def until(slurm: SlurmCluster, job: int, run: Path, is_so: Callable[[], bool]) -> None:
    """Wait until something is so of a job that goes on."""
    deadline = time.monotonic() + HANG_SECONDS
    for look in itertools.count(1):
        if is_so():
            return
        # Seldom: Slurm's answer takes long on a busy machine, and steps go by.
        if look % LOOKS_PER_QUESTION == 0 and slurm.has_ended(job):
            assert is_so(), read_log(run)[-3000:]  # it may become so and end after it
            return
        assert time.monotonic() < deadline, read_log(run)[-3000:]
        time.sleep(0.05)


def until_step(slurm: SlurmCluster, job: int, run: Path, step: int) -> None:
    until(slurm, job, run, lambda: any(each["step"] >= step for each in read_records(run)))


def read_restarts(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "restarts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(
    slurm: SlurmCluster, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that nothing happens to, with everything that the script does by default."""
    run = tmp_path_factory.mktemp("straight") / "run"
    job = submit(slurm, run, tiny_data, {}, PREFLIGHT="--megabytes=1")
    assert slurm.wait(job) == "COMPLETED", read_log(run)[-3000:]
    return run


def test_two_nodes_train(straight: Path) -> None:
    log = read_log(straight)
    assert RunDirectory(straight).read_status().state == "finished"
    assert read_records(straight)[-1]["step"] == NUM_STEPS
    for line in ("[rank 0]: node n1: ", "[rank 0]: node n2: ", f"step {NUM_STEPS}/{NUM_STEPS} |"):
        assert line in log
    (end,) = read_restarts(straight)
    assert end["decision"] == "finished"


def test_requeue_and_killed_node(
    slurm: SlurmCluster, straight: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(slurm, run, tiny_data, {})
    until_step(slurm, job, run, 8)
    slurm.command("scontrol", "requeue", str(job))
    until(slurm, job, run, lambda: "resuming from" in read_log(run))
    reached = max(record["step"] for record in read_records(run))
    until_step(slurm, job, run, reached + 3)
    killed = slurm.processes(job, "n2")
    for process in killed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert slurm.wait(job) == "COMPLETED", read_log(run)[-3000:]
    assert read_records(run) == read_records(straight)
    assert slurm.describe(job)["Restarts"] == "2"  # one by hand, one by the script
    assert len(killed) == 3  # the shell that srun started, torchrun and its rank
    assert [end["decision"] for end in read_restarts(run)] == ["requeue", "finished"]
    assert slurm.processes(job) == []


def test_warning_signal_saves_and_requeues(
    slurm: SlurmCluster, straight: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(slurm, run, tiny_data, {"checkpoint.interval": 1000})
    until_step(slurm, job, run, 8)
    slurm.command("scancel", "--batch", "--signal=USR1", str(job))  # what --signal=B:USR1@300 does
    assert slurm.wait(job) == "COMPLETED", read_log(run)[-3000:]
    assert read_records(run) == read_records(straight)
    first, last = read_restarts(run)
    assert (first["decision"], last["decision"]) == ("requeue", "finished")
    assert first["reason"].startswith("interrupted")
    assert 8 <= first["step"] < NUM_STEPS
    assert slurm.describe(job)["Restarts"] == "1"


def test_wrong_configuration_ends_the_job(
    slurm: SlurmCluster, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(slurm, run, tiny_data, {"model.num_attention_heads": 5})
    assert slurm.wait(job) == "FAILED"
    assert slurm.describe(job)["ExitCode"] == "2:0"
    assert "error: command line: model.num_attention_heads = 5" in read_log(run)
    assert slurm.describe(job)["Restarts"] == "0"


def test_cancelled_job_stays_cancelled(
    slurm: SlurmCluster, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(slurm, run, tiny_data, {})
    until_step(slurm, job, run, 3)
    slurm.command("scancel", str(job))
    assert slurm.wait(job) == "CANCELLED"
    assert not (run / "restarts.jsonl").exists()


def test_chain_goes_on_and_ends(
    slurm: SlurmCluster, straight: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Three jobs: the first is killed, the second finishes the run, the third is not needed."""
    run = tmp_path / "run"
    run.mkdir()
    arguments = tiny_arguments(run, tiny_data, SCHEDULE)
    submitted = slurm.command(
        *(str(ROOT / "slurm" / "chain.sh"), "3", *OPTIONS, f"--output={run}/job.log"),
        *(SCRIPT, *arguments),
        cwd=ROOT,
        PYTHON=sys.executable,
        PREFLIGHT="off",
        LAUNCHER="srun",
    )
    first, second, third = map(int, submitted.split())
    until_step(slurm, first, run, 8)
    for process in slurm.processes(first, "n1"):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    states = [slurm.wait(job) for job in (first, second, third)]
    assert states == ["COMPLETED", "COMPLETED", "CANCELLED"], read_log(run)[-3000:]
    assert re.search(r"^0: .* step 1/60 ", read_log(run), re.MULTILINE)  # the rank, in srun's way
    assert read_records(run) == read_records(straight)
