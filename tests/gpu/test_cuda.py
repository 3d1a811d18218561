"""On a GPU: the training command over NCCL takes the steps that the CPU takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.training import OVERLAPPED, tiny_arguments

LOSS_TOLERANCE = 1e-4  # relative, float32 with TF32 off, after five steps


def train(run: Path, data: Path, environment: dict[str, str]) -> list[float]:
    arguments = tiny_arguments(run, data, OVERLAPPED | {"validation.num_samples": 8})
    subprocess.run(
        [sys.executable, "-m", "pretrain.train", *arguments],
        check=True,
        env=os.environ | environment,
    )
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record["train/loss"] for record in map(json.loads, lines) if "train/loss" in record]


@pytest.mark.gpu
def test_steps_on_a_gpu_are_those_on_a_cpu(tiny_data: Path, tmp_path: Path) -> None:
    gpu = train(tmp_path / "gpu", tiny_data, {})
    cpu = train(tmp_path / "cpu", tiny_data, {"CUDA_VISIBLE_DEVICES": ""})
    assert gpu == pytest.approx(cpu, rel=LOSS_TOLERANCE)
