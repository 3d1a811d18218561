"""Weights & Biases: an extra that may be missing, and that must never end a run.

The calls are checked against a stand-in with the documented ones: `init(project, name, id, resume,
dir, config)`, `Run.log(data, step=)`, `Run.finish()`. What the service makes of them is not.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_eso.runs.counters import Counters
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.training.records.metrics import MetricsLog
from megatron_eso.training.records.wandb_log import WandbLog
from tests.support.processes import HANG_SECONDS
from tests.support.training import tiny_arguments

ROOT = Path(__file__).resolve().parents[3]

WITHOUT = """
import runpy, sys
sys.modules["wandb"] = None
runpy.run_module("pretrain.train", run_name="__main__", alter_sys=True)
"""

STAND_IN = """
import json, os
def tell(**call):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(call) + "\\n")
class Run:
    def log(self, data, step):
        if step == 3 and "STAND_IN_FAILS" in os.environ:
            raise ConnectionError("no route")
        tell(log=data, step=step)
    def finish(self):
        tell(finish=True)
def init(*, project, name, id, resume, dir, config):
    tell(init=project, name=name, id=id, resume=resume, dir=dir, config=config)
    if os.environ.get("STAND_IN_FAILS") == "init":
        raise ConnectionError("no key")
    return Run()
"""


def test_a_missing_package_is_one_line(tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path, tmp_path, {"run.wandb_project": '"eso"'})
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments, "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert said.returncode == 2
    assert said.stderr == (
        'error: command line: run.wandb_project = "eso": the package wandb is not installed; '
        "pip install 'megatron-eso[wandb]', or leave the key out\n"
    )


def record(path: Path, first: int) -> None:
    """Record a job of a run, from step `first` on."""
    wandb = WandbLog(path, "eso", {"train": {"num_steps": 5}})
    with MetricsLog(RunDirectory(path), Counters(step=first), wandb) as metrics:
        for step in range(first + 1, first + 4):
            metrics.log(Counters(step=step), {"train/loss": float(step)})
        metrics.log_validation(Counters(step=first + 3), {"val/nelbo": 7.0})


@pytest.mark.parametrize("fails", ["", "log", "init"])
def test_all_jobs_of_a_run_are_one_of_its_runs(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text(STAND_IN)
    run, calls = tmp_path / "base", tmp_path / "calls"
    run.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CALLS", str(calls))
    if fails:
        monkeypatch.setenv("STAND_IN_FAILS", fails)
    try:
        for first in (0, 2):
            record(run, first)
    finally:
        sys.modules.pop("wandb", None)
    found = [json.loads(line) for line in calls.read_text().splitlines()]
    begun = [call for call in found if "init" in call]
    assert [call["id"] for call in begun] == [begun[0]["id"]] * 2
    assert begun[0] | {"id": ""} == {
        "init": "eso",
        "name": "base",
        "id": "",
        "resume": "allow",
        "dir": str(run),
        "config": {"train": {"num_steps": 5}},
    }
    logged = [(call["step"], call["log"]) for call in found if "log" in call]
    loss = {step: (step, {"train/loss": float(step)}) for step in range(1, 6)}
    validated = {step: (step, {"val/nelbo": 7.0}) for step in (3, 5)}
    if fails == "init":
        assert logged == []
    elif fails == "log":
        assert logged == [loss[1], loss[2]]  # the rest of that job, and all of the next, is lost
    else:
        assert logged == [loss[1], loss[2], loss[3], validated[3]] + [
            *(loss[3], loss[4], loss[5], validated[5])
        ]
        assert [call for call in found if "finish" in call] == [{"finish": True}] * 2
    # The run's own records are whole in any case.
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 5]
