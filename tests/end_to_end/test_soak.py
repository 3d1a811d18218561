"""The long fault test, by hand: a run that is killed again and again ends as one that is not."""

import random
from pathlib import Path

import pytest

from tests.ranks.loop import run_loop
from tests.support.killed_job import MOMENTS, SCHEDULE, Job, compare_runs, kill, report_restarts
from tests.support.torchrun import NUM_RANKS
from tests.support.training import OVERLAPPED, Overrides
from tests.support.world import World

NUM_KILLS = 50
STEPS_AFTERWARDS = 50


@pytest.mark.parallel
@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_kills_change_nothing(world: World, tiny_data: Path, tmp_path: Path) -> None:
    """Save during every step, and kill a random rank, or all ranks, at random instants."""
    overrides: Overrides = OVERLAPPED | {"model.hidden_dropout": 0.1, "checkpoint.interval": 1}
    job, draw = Job(tmp_path / "killed", tiny_data, overrides), random.Random()
    for number in range(NUM_KILLS):
        kill(job, draw, number, draw.choice(MOMENTS), draw.choice((*range(NUM_RANKS), "all")))
    kill(job, draw, NUM_KILLS, draw.choice(MOMENTS), "all")
    num_steps = job.last_step() + STEPS_AFTERWARDS
    job.finish(num_steps)
    report_restarts(job, NUM_KILLS + 1)
    schedule = SCHEDULE | overrides | {"train.num_steps": num_steps}
    world.run(run_loop, NUM_RANKS, tmp_path / "straight", tiny_data, schedule)
    compare_runs(job.run, tmp_path / "straight", num_steps=num_steps)
