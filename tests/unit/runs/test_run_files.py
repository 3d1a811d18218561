"""The files of a run directory: equal to their documented bytes, and refused where they differ."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_eso.errors import CheckpointError, ConfigError
from megatron_eso.runs.checkpoint_state import CheckpointState, read_checkpoint_state
from megatron_eso.runs.counters import Counters, MovingStatistics
from megatron_eso.runs.restarts import Outcome, append_outcome, read_outcomes
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.status import JobFacts, read_recent_metrics
from megatron_eso.runs.steps import find_step, list_checkpoints, newest, step_name, step_number

STATUS_KEYS = ["format_version", "state", "step", "reason", "host", "pid", "job", "time"]
ABSENT = object()
STATE = CheckpointState(
    kind="training",
    counters=Counters(step=3, consumed_samples=24, tokens=500, flops=1e9, skipped_steps=1),
    losses=MovingStatistics(mean=2.0, variance=0.5, count=2),
    grad_norms=MovingStatistics(mean=-1.0, variance=0.25, count=2),
    ema_updates=2,
    torch_version="2.9",
    val_nelbo=5.5,
    noise_version=1,
    init_version=2,
    data={"order_version": 1},
)


def test_steps_by_name(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    for name in ("step_00000002", "step_00000010", "step_00000011.tmp", "latest", "step_12"):
        (tmp_path / name).mkdir()
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == [step_name(2), step_name(10)]
    assert [step_number(path) for path in list_checkpoints(tmp_path)] == [2, 10]
    assert newest(tmp_path) == find_step(tmp_path, None) == tmp_path / step_name(10)
    assert find_step(tmp_path, 2) == tmp_path / step_name(2)
    assert find_step(tmp_path, 3) is None


def test_a_status_states_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    run = RunDirectory(tmp_path)
    assert run.read_status() is None
    run.write_status("failed", 2, reason="OSError()")
    content = json.loads(run.status.read_text())
    assert list(content) == STATUS_KEYS
    assert content["job"] is None
    facts = JobFacts(restarts=0, num_steps=9, num_ranks=2, hosts=["a", "b"])
    run = RunDirectory(tmp_path, facts)
    run.write_status("running", 4, loss=1.5, tokens_per_second=2.0, seconds_left=0.0)
    content = json.loads(run.status.read_text())
    more = ["restarts", "num_steps", "num_ranks", "hosts", "loss", "tokens_per_second"]
    assert list(content) == [*STATUS_KEYS, *more, "seconds_left"]
    status = run.read_status()
    assert status is not None
    assert status.to_json() == content
    assert (status.state, status.step, status.hosts, status.loss) == ("running", 4, ["a", "b"], 1.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2, this version reads 1: use the megatron-eso"),
        ({"step": ABSENT}, "cannot be read .it states no step."),
        ({"format_version": ABSENT}, "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_status_that_cannot_be_read_is_refused(
    change: dict[str, object] | None, message: str, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path)
    run.write_status("running", 4)
    text = '{"state": '
    if change is not None:
        content = json.loads(run.status.read_text()) | change
        text = json.dumps({key: value for key, value in content.items() if value is not ABSENT})
    run.status.write_text(text)
    with pytest.raises(ConfigError, match=message):
        run.read_status()


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    content = STATE.to_json()
    assert list(content) == [
        *("format_version", "kind"),
        *(each.name for each in dataclasses.fields(Counters)),
        *("losses", "grad_norms", "ema_updates", "torch_version", "val_nelbo", "noise_version"),
        *("init_version", "data"),
    ]
    (tmp_path / "state.json").write_text(json.dumps(content))
    assert read_checkpoint_state(tmp_path) == STATE
    weights = CheckpointState(kind="weights", counters=Counters())
    assert sorted(weights.to_json()) == ["consumed_samples", "format_version", "kind", "step"]
    (tmp_path / "state.json").write_text(json.dumps(weights.to_json()))
    assert read_checkpoint_state(tmp_path) == weights


@pytest.mark.parametrize("missing", ["format_version", "kind", "step", "rollbacks", "losses"])
def test_a_state_with_a_part_missing_is_refused(missing: str, tmp_path: Path) -> None:
    content = STATE.to_json()
    del content[missing]
    (tmp_path / "state.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"state.json: not readable .*{missing}"):
        read_checkpoint_state(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1, "kind": "training"}'])
def test_damage_of_a_state_is_one_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json: not readable"):
        read_checkpoint_state(tmp_path)


def test_outcomes_are_added_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "restarts.jsonl"
    assert read_outcomes(path) == []
    outcomes = [
        Outcome(decision="requeue", reason="x", step=step, job=job, restart=0, time=1.5)
        for step, job in ((0, None), (4, "17"))
    ]
    for outcome in outcomes:
        append_outcome(path, outcome)
    assert read_outcomes(path) == outcomes
    first = path.read_text().splitlines()[0]
    assert first == (
        '{"decision": "requeue", "reason": "x", "step": 0, "job": null, "restart": 0, "time": 1.5}'
    )
    path.write_text(first + "\n{\n")
    with pytest.raises(ConfigError, match="line 2 cannot be read"):
        read_outcomes(path)


def test_recent_metrics_are_the_newest_of_each_tag(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_recent_metrics(path) == {}
    lines = [json.dumps({"step": step, "train/loss": step / 2}) for step in range(5000)]
    lines.insert(-1, json.dumps({"step": 4999, "val/nelbo": "nan"}))
    path.write_text("\n".join([json.dumps({"old": 1.0}), *lines, '{"step": 50']))
    found = read_recent_metrics(path)
    assert (found["step"], found["train/loss"]) == (4999, 4999 / 2)
    assert found["val/nelbo"] != found["val/nelbo"]
    assert "old" not in found
