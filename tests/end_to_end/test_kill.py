"""`kill -9` at a random instant, and the run goes on as if nothing had happened."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_eso.training.run_directory import RunDirectory
from tests.support.training import (
    OVERLAPPED,
    TP2,
    Overrides,
    read_checkpoint,
    tiny_arguments,
)

NUM_STEPS = 20
KILL_AFTER_STEP = 8
START_SECONDS = 180.0
LOSS_TOLERANCE = 1e-5  # relative, where the layout changes

CASES: dict[str, Overrides] = {
    "overlapped, dropout": OVERLAPPED | {"model.hidden_dropout": 0.1},
    "TP=2": TP2,
}


def launch(run: Path, data: Path, overrides: Overrides) -> subprocess.Popen[bytes]:
    """Start the training command on two ranks."""
    run.mkdir(parents=True, exist_ok=True)
    schedule = {
        "train.num_steps": NUM_STEPS,
        "checkpoint.interval": 4,
        "validation.interval": 10,
        "validation.num_samples": 8,
        # Low enough for differences of rounding to stay what they are on another layout.
        "optimizer.learning_rate": 3e-3,
    }
    arguments = tiny_arguments(run, data, schedule | overrides)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with (run / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "pretrain.train", *arguments],
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """`kill -9` of the launcher and of its ranks, which are not in its process group."""
    launcher = psutil.Process(process.pid)
    doomed = [*launcher.children(recursive=True), launcher]
    for each in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(doomed)


def finish(
    run: Path, data: Path, overrides: Overrides, time_limit_seconds: float = START_SECONDS
) -> None:
    process = launch(run, data, overrides)
    assert process.wait(time_limit_seconds) == 0, (run / "log").read_text()[-3000:]
    assert RunDirectory(run).read_status()["state"] == "finished"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """What must not depend on the interruption: everything but the clock."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [
        {key: value for key, value in record.items() if not key.startswith("perf/")}
        for record in records
    ]


def kill_at_random(run: Path, data: Path, overrides: Overrides, draw: random.Random) -> int:
    """Start, wait until some steps are taken, and kill every process at once."""
    process = launch(run, data, overrides)
    deadline = time.monotonic() + START_SECONDS
    target = KILL_AFTER_STEP + draw.randrange(6)
    while not any(record["step"] >= target for record in read_metrics(run)):
        assert process.poll() is None, (run / "log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(draw.uniform(0.0, 0.2))
    kill_all(process)
    assert RunDirectory(run).read_status()["state"] == "running"
    return max(record["step"] for record in read_metrics(run))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_run_resumes_bitwise(case: str, tiny_data: Path, tmp_path: Path) -> None:
    overrides = CASES[case]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finish(straight, tiny_data, overrides)
    draw = random.Random()
    step = kill_at_random(killed, tiny_data, overrides, draw)
    if case == "TP=2":
        shutil.copytree(killed, tmp_path / "moved")
    finish(killed, tiny_data, overrides)
    print(f"{case}: killed at step {step}")
    assert "resuming from" in (killed / "log").read_text()
    assert read_metrics(killed) == read_metrics(straight)
    name = f"step_{NUM_STEPS:08d}"
    expected = read_checkpoint(straight / "checkpoints" / name)
    found = read_checkpoint(killed / "checkpoints" / name)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    if case == "TP=2":
        finish(tmp_path / "moved", tiny_data, OVERLAPPED)
        for moved, record in zip(
            read_metrics(tmp_path / "moved"), read_metrics(straight), strict=True
        ):
            keys = [key for key in record if key in ("train/loss", "val/nelbo")]
            assert [moved[key] for key in keys] == pytest.approx(
                [record[key] for key in keys], rel=LOSS_TOLERANCE
            )
