"""The decision about a run after its job's ranks have ended, from real run directories."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_eso.errors import ConfigError, DataError
from megatron_eso.runs.restarts import write_failure
from megatron_eso.runs.run_directory import RunDirectory
from pretrain import train
from pretrain.outcome import MAX_FRUITLESS_RESTARTS, judge, main

JOB = "17"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setenv("SLURM_JOB_ID", JOB)
    run = RunDirectory(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    return run


def end_life(run: RunDirectory) -> str:
    """Do what the job script does: take the decision, and write its line in the history."""
    main(layers(run))
    return str(json.loads(history(run)[-1])["decision"])


def layers(run: RunDirectory) -> list[str]:
    return ["quickstart.toml", f"run.directory={run.path}"]


def history(run: RunDirectory) -> list[str]:
    return (run.path / "restarts.jsonl").read_text().splitlines()


def save_step(run: RunDirectory, step: int) -> None:
    (run.checkpoints / f"step_{step:08d}").mkdir()


@pytest.mark.parametrize(
    ("state", "reason", "decision"),
    [
        ("finished", "train.num_steps reached", "finished"),
        ("interrupted", "SIGUSR1", "requeue"),
        ("failed", "RuntimeError: out of memory", "requeue"),
        ("running", "", "requeue"),
    ],
)
def test_status_decides(run: RunDirectory, state: str, reason: str, decision: str) -> None:
    run.write_status(state, 12, reason=reason)
    assert judge(run, JOB).decision == decision


def test_status_of_another_job_says_nothing(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "16")
    run.write_status("finished", 12)
    outcome = judge(run, JOB)
    assert outcome.decision == "requeue"
    assert "crashed (before the first step)" in outcome.reason


def test_stop_file_ends(run: RunDirectory) -> None:
    run.write_status("interrupted", 12, reason="the file stop")
    (run.path / "stop").touch()
    assert judge(run, JOB).decision == "stop"


def test_restarts_without_progress_are_bounded(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    run.write_status("running", 4)
    save_step(run, 4)
    decisions = [end_life(run) for _ in range(MAX_FRUITLESS_RESTARTS)]
    save_step(run, 8)  # progress: the count begins anew
    decisions += [end_life(run) for _ in range(1 + MAX_FRUITLESS_RESTARTS)]
    assert decisions == ["requeue"] * (2 * MAX_FRUITLESS_RESTARTS) + ["stop"]
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert "3 restarts in a row made no checkpoint after step 8" in last_line
    assert end_life(run) == "requeue"  # submitted again by hand: it may try again


@pytest.mark.parametrize(("job", "decision"), [("16", "stop"), (JOB, "requeue")])
def test_a_directory_that_another_job_holds_is_left_alone(
    run: RunDirectory, job: str, decision: str
) -> None:
    run.write_status("running", 4)
    program = (
        "import sys; from pathlib import Path\n"
        "from megatron_eso.runs.run_directory import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1])).locked(): print('held', flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(run.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"SLURM_JOB_ID": job},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    outcome = judge(run, JOB)
    holder.communicate(b"\n")
    assert outcome.decision == decision
    assert (f"process {holder.pid} on" in outcome.reason) == (decision == "stop")
    assert judge(run, JOB).decision == "requeue"


def test_directory_of_a_configuration(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--directory", *layers(run)])
    assert capsys.readouterr().out == f"{run.path}\n"


def test_what_the_user_has_to_correct_stops_whichever_rank_met_it(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.write_status("failed", 12, reason="RuntimeError: connection closed by peer")
    write_failure(run.failure, DataError("shards/train: shard 3 is damaged"))
    outcome = judge(run, JOB)
    assert outcome.decision == "stop"
    assert outcome.reason == (
        "failed (shards/train: shard 3 is damaged): correct that and submit again"
    )
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert judge(run, JOB).decision == "requeue"  # it is of the job's start before
    assert judge(run, "18").decision == "requeue"


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 99}'])
def test_a_damaged_record_of_a_failure_is_one_line(run: RunDirectory, text: str) -> None:
    run.failure.write_text(text)
    with pytest.raises(ConfigError, match=r"failure.json: cannot be read .*; remove it"):
        judge(run, JOB)


def test_a_refused_start_is_not_requeued(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.write_status("finished", 12, reason="train.num_steps reached")
    before = run.status.read_bytes()
    arguments = [*layers(run), f"data.train={tmp_path / 'typo'}"]
    with pytest.raises(ConfigError, match="typo"):
        train.main(arguments)
    main(arguments)
    assert capsys.readouterr().out == "stop\n"
    assert run.status.read_bytes() == before


@pytest.mark.parametrize("rank", ["0", "3"])
def test_a_refusal_of_any_rank_is_recorded(
    run: RunDirectory, tmp_path: Path, rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(ConfigError, match="typo"):
        train.main([*layers(run), f"data.train={tmp_path / 'typo'}"])
    assert "typo" in judge(run, JOB).reason
