"""The long fault test, by hand: a run that is killed again and again ends as one that is not."""

import random
import time
from pathlib import Path

import pytest
import torch

from megatron_eso.training.run_directory import RunDirectory
from tests.end_to_end.test_kill import finish, kill_all, launch, read_metrics
from tests.support.training import OVERLAPPED, Overrides, read_checkpoint

NUM_KILLS = 20
NUM_STEPS = 300
TIME_LIMIT_SECONDS = 900.0
LONGEST_LIFE_SECONDS = 16.0  # beyond the start, so that kills fall on resume, steps and saves alike


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_kills_change_nothing(tiny_data: Path, tmp_path: Path) -> None:
    overrides: Overrides = OVERLAPPED | {
        "model.hidden_dropout": 0.1,
        "checkpoint.interval": 1,
        "train.num_steps": NUM_STEPS,
    }
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finish(straight, tiny_data, overrides, TIME_LIMIT_SECONDS)
    draw = random.Random()
    for number in range(NUM_KILLS):
        process = launch(killed, tiny_data, overrides)
        time.sleep(draw.uniform(0.0, LONGEST_LIFE_SECONDS))
        over = process.poll() is not None
        if not over:
            kill_all(process)
        steps = [record["step"] for record in read_metrics(killed)]
        print(f"kill {number}: at step {max(steps, default=0)}")
        if over:
            break
    finish(killed, tiny_data, overrides, TIME_LIMIT_SECONDS)
    assert RunDirectory(killed).read_status()["state"] == "finished"
    assert read_metrics(killed) == read_metrics(straight)
    name = f"step_{NUM_STEPS:08d}"
    expected = read_checkpoint(straight / "checkpoints" / name)
    found = read_checkpoint(killed / "checkpoints" / name)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
