"""`kill -9` of any rank, or of all: the run continues and ends as if nothing had happened.

torchrun starts the ranks again when one has died (`--max-restarts`). When torchrun has died too, a
job script starts it again: here a loop stands for it.
"""

import random
from pathlib import Path

import pytest

from tests.ranks.loop import run_loop
from tests.support.killed_job import (
    MOMENTS,
    SCHEDULE,
    Job,
    compare_runs,
    kill,
    report_restarts,
)
from tests.support.torchrun import NUM_RANKS
from tests.support.training import OVERLAPPED
from tests.support.world import World

STEPS_AFTERWARDS = 5


@pytest.mark.parallel
@pytest.mark.slow
def test_a_run_continues_after_kills(world: World, tiny_data: Path, tmp_path: Path) -> None:
    """One kill at each kind of moment, in a random order; the last one kills all processes."""
    overrides = OVERLAPPED | {"model.hidden_dropout": 0.1}
    draw, job = random.Random(), Job(tmp_path / "killed", tiny_data, overrides)
    # torchrun waits half a minute for a rank that waits for one that died at the start: there all
    # processes are killed.
    *moments, last = *draw.sample(MOMENTS[1:], len(MOMENTS) - 1), "start"
    for number, moment in enumerate(moments):
        kill(job, draw, number, moment, draw.randrange(NUM_RANKS))
    kill(job, draw, len(moments), last, "all")
    num_steps = job.last_step() + STEPS_AFTERWARDS
    job.finish(num_steps)
    report_restarts(job, len(MOMENTS))
    # The run that it is compared with is not killed, and needs no launcher.
    schedule = SCHEDULE | overrides | {"train.num_steps": num_steps}
    world.run(run_loop, NUM_RANKS, tmp_path / "straight", tiny_data, schedule)
    compare_runs(job.run, tmp_path / "straight", num_steps=num_steps)
