"""The run directory and its records: a lock, and curves without doubled or missing steps."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_eso.errors import ConfigError
from megatron_eso.runs.counters import Counters
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.training.records.metrics import MetricsLog

HOLD = """
import sys
from pathlib import Path
from megatron_eso.runs.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()  # until it is killed
"""


def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"SLURM_JOB_ID": "4711"},
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(ConfigError, match=f"process {holder.pid} on .* of job 4711"),
            RunDirectory(tmp_path).locked(),
        ):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with RunDirectory(tmp_path).locked():  # a killed process lets go
        pass


def counters(step: int) -> Counters:
    return Counters(step=step, tokens=1000 * step, flops=5e9 * step)


def read_scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_a_resumed_run_continues_its_curves(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with MetricsLog(run, Counters()) as metrics:
        for step in range(1, 7):
            metrics.log(counters(step), {"train/loss": float(step)})
            metrics.log_validation(counters(step), {"val/nelbo": 10.0 + step})
    with run.metrics.open("a") as stream:
        stream.write('{"step": 7, "train/lo')  # a kill in the middle of a line
    with MetricsLog(run, counters(4)) as metrics:
        for step in (5, 6):
            metrics.log(counters(step), {"train/loss": 100.0 + step})
            metrics.log_validation(counters(step), {"val/nelbo": 20.0 + step})
    expected = [1.0, 2.0, 3.0, 4.0, 105.0, 106.0]
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["train/loss"] for line in lines if "train/loss" in line] == expected
    assert read_scalars(run.tensorboard, "train/loss") == list(enumerate(expected, 1))
    by_flops = read_scalars(run.tensorboard / "scaling_by_flops", "scaling/val_nelbo_by_flops")
    assert by_flops == [(5, 11.0), (10, 12.0), (15, 13.0), (20, 14.0), (25, 25.0), (30, 26.0)]
    by_tokens = read_scalars(run.tensorboard / "scaling_by_tokens", "scaling/val_nelbo_by_tokens")
    assert [step for step, _ in by_tokens] == [1000, 2000, 3000, 4000, 5000, 6000]


def test_values_that_are_not_finite_stay_readable_json(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with MetricsLog(run, Counters()) as metrics:
        metrics.log(counters(1), {"train/loss": float("nan"), "train/grad_norm": float("inf")})
    line = json.loads(run.metrics.read_text(), parse_constant=pytest.fail)
    del line["perf/time"]
    assert line == {"step": 1, "train/loss": "nan", "train/grad_norm": "inf"}


def test_every_line_has_the_time_at_which_it_was_recorded(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with MetricsLog(run, Counters()) as metrics:
        metrics.log(counters(1), {"train/loss": 1.0})
        metrics.log_validation(counters(1), {"val/nelbo": 10.0})
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [type(line["perf/time"]) for line in lines] == [float, float]
    accumulator = EventAccumulator(str(run.tensorboard)).Reload()
    assert "perf/time" not in accumulator.Tags()["scalars"]


READ_ALONE = """
import sys
import torch
from torch.distributed.checkpoint import load, save
from megatron_eso.training.records.log import start_logging
start_logging()
state = {"weight": torch.zeros(1)}
save(state, checkpoint_id=sys.argv[1], no_dist=True)
load(state, checkpoint_id=sys.argv[1], no_dist=True)
"""


def test_a_rank_that_reads_a_checkpoint_by_itself_logs_no_warning(tmp_path: Path) -> None:
    """Torch warns of it; a run reads so at each resume, on purpose."""
    command = [sys.executable, "-c", READ_ALONE, str(tmp_path / "checkpoint")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
