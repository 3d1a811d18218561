"""Updates that must not be applied: skipped on all ranks, counted, logged; then a way back."""

import json
import math
import shutil
import socket
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_eso.runs.counters import WARMUP_STEPS
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.steps import list_checkpoints
from tests.ranks.loop import Ran, run_loop
from tests.ranks.skipping import (
    BAD_RANK,
    BAD_STEP,
    BATCH,
    continue_elsewhere,
    spoil,
    spoil_and_watch,
)
from tests.support.torchrun import read_records
from tests.support.training import LAYOUTS, OVERLAPPED, Overrides
from tests.support.world import World

pytestmark = pytest.mark.parallel


def rank_log(run: Path, rank: int = 0) -> str:
    return (run / "logs" / f"rank_{rank:05d}.log").read_text()


CASES: dict[str, tuple[Overrides, str]] = {
    "TP=2 SP": (LAYOUTS["TP=2 SP"][1], "output"),
    "TP=2, gradient of one copy": (LAYOUTS["TP=2"][1], "gradient"),
    "PP=2 interleaved": (LAYOUTS["PP=2 interleaved"][1], "output"),
    "DP=2": ({}, "output"),
    "DP=2, gradient": ({}, "gradient"),
    "DP=2 overlapped, bf16": (OVERLAPPED | {"train.precision": '"bf16"'}, "output"),
}


@pytest.mark.parametrize("case", CASES)
def test_no_rank_applies_an_update_that_is_not_finite(
    case: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    overrides, where = CASES[case]
    overrides = overrides | {"train.num_steps": BAD_STEP + 1, "validation.num_samples": 2}
    ranks: list[Ran] = world.run(
        run_loop, 2, tmp_path, tiny_data, overrides, spoil_and_watch, where
    )
    for ran in ranks:
        assert ran.error is None
        before, skipped, after = ran.gathered[BAD_STEP - 2 :]
        # Weights that are gathered in the next forward pass are not there yet.
        kinds = [kind for kind in before[1] if kind != "model" or "overlapped" not in case]
        assert [skipped[1][kind] for kind in kinds] == [before[1][kind] for kind in kinds]
        assert after[1]["main"] != before[1]["main"]
        assert (skipped[0].skipped_steps, skipped[0].skipped_in_row) == (1, 1)
        assert (after[0].step, after[0].skipped_steps, after[0].skipped_in_row) == (4, 1, 0)
    if case.startswith("DP=2") and "overlapped" not in case:
        assert ranks[0].gathered[-1][1]["model"] == ranks[1].gathered[-1][1]["model"]
    first, last = BATCH * (BAD_STEP - 1), BATCH * BAD_STEP - 1
    line = next(line for line in rank_log(tmp_path).splitlines() if "UPDATE SKIPPED" in line)
    assert f"step {BAD_STEP}, samples {first} to {last}:" in line
    assert "(diffusion " in line
    assert ", sequential " in line
    if case == "DP=2":
        assert line.endswith(f"; not finite on rank {BAD_RANK} on {socket.gethostname()}")
    assert "UPDATE SKIPPED" not in rank_log(tmp_path, 1)  # one rank logs it
    (record,) = (r for r in read_records(tmp_path) if r["step"] == BAD_STEP and "train/loss" in r)
    assert record["train/skipped_steps"] == 1
    finite = [math.isfinite(float(record[f"train/{name}"])) for name in ("loss", "grad_norm")]
    assert not all(finite)


SPIKY: Overrides = {
    "train.num_steps": WARMUP_STEPS + 10,
    "checkpoint.interval": WARMUP_STEPS + 2,
    "optimizer.learning_rate": 1e-3,
    "validation.num_samples": 2,
}
SPIKE_STEP = WARMUP_STEPS + 5


@pytest.mark.parametrize("skip_deviations", [0.0, 8.0])
def test_spikes_are_flagged_and_a_resumed_run_judges_alike(
    skip_deviations: float, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    overrides = SPIKY | {"train.skip_deviations": skip_deviations}
    factors = {BATCH * (SPIKE_STEP - 1): 1e2}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    world.run(run_loop, 2, straight, tiny_data, overrides, spoil, factors)
    # The job before ended at the checkpoint, two steps after the judging began.
    kept = straight / "checkpoints" / f"step_{WARMUP_STEPS + 2:08d}"
    shutil.copytree(kept, resumed / "checkpoints" / kept.name)
    (ran, _) = world.run(run_loop, 2, resumed, tiny_data, overrides, spoil, factors)
    expected = [r for r in read_records(straight) if r["step"] > WARMUP_STEPS + 2]
    assert [r for r in read_records(resumed) if r["step"] > WARMUP_STEPS + 2] == expected
    by_step = {r["step"]: r for r in expected if "train/loss" in r}
    assert by_step[SPIKE_STEP]["train/deviations"] > 8.0
    assert by_step[SPIKE_STEP]["train/spikes"] - by_step[SPIKE_STEP - 1]["train/spikes"] == 1
    assert ran.counters.skipped_steps == (skip_deviations > 0)
    what = "UPDATE SKIPPED" if skip_deviations else "spike: "
    assert f"step {SPIKE_STEP}, " in rank_log(resumed)
    assert what in rank_log(resumed)


ROLLBACK: Overrides = {
    "train.num_steps": 10,
    "train.max_skipped_in_row": 3,
    "checkpoint.interval": 2,
    "validation.interval": 2,
    "validation.num_samples": 2,
}


@pytest.mark.parametrize("layout", ["DP=2 overlapped", "TP=2 SP"])
def test_going_back_skips_the_data_and_rewinds_the_records(
    layout: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    """Updates 6 to 8 cannot be applied: back to the checkpoint of step 4, then other samples."""
    overrides = ROLLBACK | (OVERLAPPED if layout == "DP=2 overlapped" else LAYOUTS[layout][1])
    bad = {BATCH * step: math.nan for step in (5, 6, 7)}
    run, other = tmp_path / "run", tmp_path / "other"
    (ran, _) = world.run(run_loop, 2, run, tiny_data, overrides, spoil, bad)
    assert ran.error is None
    assert (ran.counters.step, ran.counters.rollbacks) == (10, 1)
    assert ran.counters.consumed_samples == BATCH * (8 + 6)
    assert f"went back from step 8 to step_00000004; samples {BATCH * 4} to {BATCH * 8 - 1}" in (
        rank_log(run)
    )
    # A run that continues from that checkpoint with the later samples has the same losses.
    before = run / "checkpoints" / "step_00000004"
    shutil.copytree(before, other / "checkpoints" / before.name)
    expected = world.run(continue_elsewhere, 2, other, tiny_data, overrides, BATCH * 8)[0]
    records = read_records(run)
    steps = [record for record in records if "train/loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 11))
    assert [record["train/loss"] for record in steps[4:]] == expected
    assert [record["train/rollbacks"] for record in steps] == [0] * 4 + [1] * 6
    assert [record["step"] for record in records if "val/nelbo" in record] == [0, 2, 4, 6, 8, 10]
    # The checkpoints of steps 6 and 8 are those of the second way.
    for step in (6, 8, 10):
        state = json.loads((run / f"checkpoints/step_{step:08d}/state.json").read_text())
        assert (state["rollbacks"], state["consumed_samples"]) == (1, BATCH * (step + 4))
    accumulator = EventAccumulator(str(run / "tensorboard")).Reload()
    for tag, shown in (("train/loss", range(1, 11)), ("val/nelbo", range(0, 11, 2))):
        assert [event.step for event in accumulator.Scalars(tag)] == list(shown)


def test_a_run_that_cannot_continue_stops_with_one_line(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    """Spoil every update from step 6 on: the run goes back to step 4, then to step 2, then ends."""
    bad = {BATCH * number: math.nan for number in range(5, 100)}
    ranks = world.run(run_loop, 2, tmp_path, tiny_data, ROLLBACK, spoil, bad)
    for ran in ranks:
        assert "3 updates in a row were skipped, after going back 2 times" in ran.error
        assert "\n" not in ran.error
    log = rank_log(tmp_path)
    assert "went back from step 8 to step_00000004" in log
    assert "went back from step 7 to step_00000002" in log
    status = RunDirectory(tmp_path).read_status()
    assert status is not None
    assert (status.state, status.step) == ("failed", 5)
    assert "train.max_rollbacks" in status.reason
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")][-1] == "step_00000004"


def test_without_a_checkpoint_there_is_no_way_back(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    bad = {BATCH * number: math.nan for number in range(100)}
    (ran, _) = world.run(run_loop, 2, tmp_path, tiny_data, ROLLBACK, spoil, bad)
    assert "there is no checkpoint to go back to" in ran.error
    status = RunDirectory(tmp_path).read_status()
    assert status is not None
    assert status.state == "failed"
