"""`kill -9` of any rank, or of all, at any instant: the run comes back and ends as if undisturbed.

torchrun starts the ranks again when one has died (`--max-restarts`). When torchrun has died too, a
job script starts it again: here a loop stands for it.
"""

import random
from pathlib import Path

import pytest

from tests.support.killed_job import (
    MOMENTS,
    NUM_STEPS,
    Job,
    RunFinishedError,
    compare_runs,
    kill,
    report_restarts,
)
from tests.support.processes import kill_tree
from tests.support.torchrun import read_records
from tests.support.training import OVERLAPPED, TP2, Overrides

LOSS_TOLERANCE = 1e-5  # relative, where the layout changes
STEPS_AFTERWARDS = 12


@pytest.mark.slow
def test_a_run_survives_kills(tiny_data: Path, tmp_path: Path) -> None:
    """One kill at each kind of moment; a run that finishes too early is followed by another."""
    overrides = OVERLAPPED | {"model.hidden_dropout": 0.1}
    straight = Job(tmp_path / "straight", tiny_data, overrides)
    straight.finish()
    draw = random.Random()
    moments = draw.sample(MOMENTS, len(MOMENTS))
    while moments:
        job, num_left = Job(tmp_path / f"killed_{len(moments)}", tiny_data, overrides), len(moments)
        try:
            while moments:
                # torchrun waits half a minute for a rank that waits for one that died at the start.
                victims = ("all",) if moments[-1] == "start" else (0, 1)
                kill(job, draw, len(MOMENTS) - len(moments), moments[-1], victims)
                moments.pop()
        except RunFinishedError:
            assert len(moments) < num_left, "not one kill in a whole run"
        job.finish()
        report_restarts(job, num_left - len(moments))
        compare_runs(job.run, straight.run, num_steps=NUM_STEPS)


@pytest.mark.slow
def test_a_killed_run_goes_on_at_another_layout(tiny_data: Path, tmp_path: Path) -> None:
    killed = Job(tmp_path / "killed", tiny_data, TP2 | {"train.num_steps": 100_000})
    killed.wait_for(lambda: killed.last_step() >= 8)
    kill_tree(killed.process)
    num_steps: Overrides = {"train.num_steps": killed.last_step() + STEPS_AFTERWARDS}
    straight = Job(tmp_path / "straight", tiny_data, TP2 | num_steps)
    straight.finish()
    Job(tmp_path / "killed", tiny_data, OVERLAPPED | num_steps).finish()
    assert "resuming from" in killed.log.read_text()
    records = zip(read_records(killed.run), read_records(straight.run), strict=True)
    for moved, record in records:
        keys = [key for key in record if key in ("train/loss", "val/nelbo")]
        assert [moved[key] for key in keys] == pytest.approx(
            [record[key] for key in keys], rel=LOSS_TOLERANCE
        )
