"""Two runs with `train.deterministic` are bitwise the same, on the CPU and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_eso.runs.run_directory import RunDirectory
from tests.support.processes import HANG_SECONDS
from tests.support.torchrun import read_records
from tests.support.training import Overrides, read_checkpoint, tiny_arguments

OVERRIDES: Overrides = {
    "train.deterministic": "true",
    "train.precision": '"bf16"',
    "train.num_steps": 3,
    "model.hidden_dropout": 0.1,
    "validation.num_samples": 8,
}


def start(run: Path, data: Path, overrides: Overrides) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pretrain.train", *tiny_arguments(run, data, overrides)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("auto", marks=pytest.mark.gpu)])
def test_deterministic_runs_are_bitwise_the_same(
    device: str, tiny_data: Path, tmp_path: Path
) -> None:
    overrides = OVERRIDES | {"train.device": f'"{device}"'}
    runs = [tmp_path / name for name in ("first", "second")]
    for process in [start(run, tiny_data, overrides) for run in runs]:
        _, errors = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 0, errors
    curves = [read_records(run) for run in runs]
    assert len(curves[0]) >= 3
    assert curves[0] == curves[1]
    first, second = (
        read_checkpoint(RunDirectory(run).checkpoints / "step_00000003") for run in runs
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
