"""The long fault test, by hand: a run that is killed again and again ends as one that is not."""

import random
from pathlib import Path

import pytest

from tests.support.killed_job import MOMENTS, Job, compare_runs, kill, report_restarts
from tests.support.training import OVERLAPPED, Overrides

NUM_KILLS = 50
NUM_STEPS = 300


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_kills_change_nothing(tiny_data: Path, tmp_path: Path) -> None:
    """Save during every step, and kill a random rank, or all ranks, at random instants."""
    overrides: Overrides = OVERLAPPED | {
        "model.hidden_dropout": 0.1,
        "checkpoint.interval": 1,
        "train.num_steps": NUM_STEPS,
    }
    straight = Job(tmp_path / "straight", tiny_data, overrides)
    straight.finish()
    job, draw = Job(tmp_path / "killed", tiny_data, overrides), random.Random()
    for number in range(NUM_KILLS):
        kill(job, draw, number, draw.choice(MOMENTS))
    job.finish()
    report_restarts(job, NUM_KILLS)
    compare_runs(job.run, straight.run, num_steps=NUM_STEPS)
