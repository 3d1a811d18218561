"""The job script on real Slurm: two nodes train over gloo; what ends a job does not end the run.

Every run is compared bitwise with one that nothing happens to, in the worker processes of `world`.
A run that is to be ended from outside has no last step until that has happened: its length is in a
configuration layer of its own, which the job reads again at each start.
"""

import contextlib
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_eso.runs.run_directory import RunDirectory
from tests.ranks.loop import run_loop
from tests.support.processes import HANG_SECONDS
from tests.support.slurm_cluster import SlurmCluster
from tests.support.torchrun import read_records
from tests.support.training import Overrides, tiny_arguments
from tests.support.world import World

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "slurm" / "train.sbatch")
NUM_STEPS = 10
STEPS_AFTERWARDS = 8
SCHEDULE: Overrides = {
    "train.num_steps": NUM_STEPS,
    "checkpoint.interval": 2,
    "validation.interval": 10,
    "validation.num_samples": 8,
    "model.hidden_dropout": 0.1,
    "parallel.use_distributed_optimizer": "true",
}
ENDLESS = 100_000
LOOKS_PER_QUESTION = 50
# On a busy machine a rank may send its clock long after it has read it.
PREFLIGHT = f"--megabytes=1 --max-clock-skew={HANG_SECONDS:g}"
OPTIONS = ("--nodes=2", "--cpus-per-task=2")

pytestmark = [pytest.mark.slow, pytest.mark.parallel]


def arguments_of(run: Path, data: Path, overrides: Overrides) -> list[str]:
    """Return a run's command line; its length is in the file `length.toml`, if there is one."""
    length = run.with_name("length.toml")
    layers = [str(length)] if length.exists() else []
    return [*tiny_arguments(run, data, SCHEDULE | overrides), *layers]


def write_length(run: Path, num_steps: int) -> None:
    run.mkdir(parents=True, exist_ok=True)
    run.with_name("length.toml").write_text(f"train.num_steps = {num_steps}\n")


def submit(
    slurm: SlurmCluster, run: Path, data: Path, overrides: Overrides, **environment: str
) -> int:
    """Start the job script as a user would, from the root of the repository."""
    run.mkdir(parents=True, exist_ok=True)
    return slurm.submit(
        *OPTIONS,
        f"--output={run}/job.log",
        SCRIPT,
        *arguments_of(run, data, overrides),
        cwd=ROOT,
        **({"PYTHON": sys.executable, "PREFLIGHT": "off"} | environment),
    )


@contextlib.contextmanager
def last_steps(slurm: SlurmCluster, job: int, run: Path) -> Iterator[int]:
    """Freeze a job's processes meanwhile, and have the run end some steps later, whatever happens.

    Yields:
        The last step of the run.
    """
    processes = slurm.processes(job)
    for process in processes:
        process.suspend()
    num_steps = max(record["step"] for record in read_records(run)) + STEPS_AFTERWARDS
    write_length(run, num_steps)
    yield num_steps
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def kill_node(slurm: SlurmCluster, job: int, node: str) -> int:
    """Kill the processes of a job's steps on a node, and return how many there were."""
    killed = slurm.processes(job, node)
    for process in killed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return len(killed)


def compare_with_undisturbed(
    world: World, run: Path, data: Path, num_steps: int, overrides: Overrides
) -> None:
    """Check that a run has the records of one of the same length that nothing happened to."""
    straight = run.with_name("straight")
    overrides = SCHEDULE | overrides | {"train.num_steps": num_steps}
    world.run(run_loop, 2, straight, data, overrides)
    assert read_records(run) == read_records(straight)
    assert read_records(run)[-1]["step"] == num_steps


def read_log(run: Path) -> str:
    path = run / "job.log"
    return path.read_text() if path.exists() else "no log"


def until(slurm: SlurmCluster, job: int, run: Path, is_so: Callable[[], bool]) -> None:
    """Wait until something is so of a job that has not ended."""
    deadline = time.monotonic() + HANG_SECONDS
    for look in itertools.count(1):
        if is_so():
            return
        # Not often: Slurm's answer takes long on a busy machine.
        if look % LOOKS_PER_QUESTION == 0 and slurm.has_ended(job):
            assert is_so(), read_log(run)[-3000:]  # it may become so and end after it
            return
        assert time.monotonic() < deadline, read_log(run)[-3000:]
        time.sleep(0.05)


def until_step(slurm: SlurmCluster, job: int, run: Path, step: int) -> None:
    until(slurm, job, run, lambda: any(each["step"] >= step for each in read_records(run)))


def read_restarts(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "restarts.jsonl").read_text().splitlines()]


def test_two_nodes_train(
    slurm: SlurmCluster, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    """A run that nothing happens to, with everything that the script does by default."""
    run = tmp_path / "run"
    job = submit(slurm, run, tiny_data, {}, PREFLIGHT=PREFLIGHT)
    assert slurm.wait(job) == "COMPLETED", read_log(run)[-3000:]
    log = read_log(run)
    assert RunDirectory(run).read_status().state == "finished"
    for line in ("[rank 0]: node n1: ", "[rank 0]: node n2: ", f"step {NUM_STEPS}/{NUM_STEPS} |"):
        assert line in log
    (end,) = read_restarts(run)
    assert end["decision"] == "finished"
    compare_with_undisturbed(world, run, tiny_data, NUM_STEPS, {})


def test_requeue_and_killed_node(
    slurm: SlurmCluster, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    write_length(run, ENDLESS)
    job = submit(slurm, run, tiny_data, {})
    until_step(slurm, job, run, 4)
    slurm.command("scontrol", "requeue", str(job))
    until(slurm, job, run, lambda: "resuming from" in read_log(run))
    reached = max(record["step"] for record in read_records(run))
    until_step(slurm, job, run, reached + 3)
    with last_steps(slurm, job, run) as num_steps:
        assert kill_node(slurm, job, "n2") >= 2  # torchrun and its rank
    assert slurm.wait(job) == "COMPLETED", read_log(run)[-3000:]
    assert slurm.describe(job)["Restarts"] == "2"  # one by hand, one by the script
    assert [end["decision"] for end in read_restarts(run)] == ["requeue", "finished"]
    assert slurm.processes(job) == []
    compare_with_undisturbed(world, run, tiny_data, num_steps, {})


def test_warning_signal_saves_and_requeues(
    slurm: SlurmCluster, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    run, overrides = tmp_path / "run", {"checkpoint.interval": 1000}
    write_length(run, ENDLESS)
    job = submit(slurm, run, tiny_data, overrides)
    until_step(slurm, job, run, 4)
    with last_steps(slurm, job, run) as num_steps:
        # What --signal=B:USR1@300 does.
        slurm.command("scancel", "--batch", "--signal=USR1", str(job))
    assert slurm.wait(job) == "COMPLETED", read_log(run)[-3000:]
    first, last = read_restarts(run)
    assert (first["decision"], last["decision"]) == ("requeue", "finished")
    assert first["reason"].startswith("interrupted")
    assert 4 <= first["step"] < num_steps
    assert slurm.describe(job)["Restarts"] == "1"
    compare_with_undisturbed(world, run, tiny_data, num_steps, overrides)


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
    write_length(run, ENDLESS)
    job = submit(slurm, run, tiny_data, {})
    until_step(slurm, job, run, 3)
    slurm.command("scancel", str(job))
    assert slurm.wait(job) == "CANCELLED"
    assert not (run / "restarts.jsonl").exists()


def test_chain_continues_and_ends(
    slurm: SlurmCluster, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    """Three jobs: the first is killed, the second finishes the run, the third is not needed."""
    run = tmp_path / "run"
    write_length(run, ENDLESS)
    submitted = slurm.command(
        *(str(ROOT / "slurm" / "chain.sh"), "3", *OPTIONS, f"--output={run}/job.log"),
        *(SCRIPT, *arguments_of(run, tiny_data, {})),
        cwd=ROOT,
        PYTHON=sys.executable,
        PREFLIGHT="off",
        LAUNCHER="srun",
    )
    first, second, third = map(int, submitted.split())
    until_step(slurm, first, run, 4)
    with last_steps(slurm, first, run) as num_steps:
        kill_node(slurm, first, "n1")
    states = [slurm.wait(job) for job in (first, second, third)]
    assert states == ["COMPLETED", "COMPLETED", "CANCELLED"], read_log(run)[-3000:]
    # The rank, in srun's way.
    assert re.search(rf"^0: .* step 1/{ENDLESS} ", read_log(run), re.MULTILINE)
    compare_with_undisturbed(world, run, tiny_data, num_steps, {})
