"""The whole quickstart with a smaller model, and commands that are refused."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_eso.runs.run_directory import RunDirectory
from tests.ranks.loop import run_loop
from tests.support.processes import HANG_SECONDS
from tests.support.training import tiny_arguments
from tests.support.world import World

START_TOLERANCE = 0.05  # of the NELBO before training, relative to the uniform distribution's

LATE_ON_RANK_0 = """
import os, time
from pathlib import Path
from types import SimpleNamespace
from megatron_eso import ranks
from megatron_eso.errors import run_command
from pretrain.train import main
waits, sleep = Path(__file__).with_name("rank_1_waits"), time.sleep
def wait_for_rank_0(seconds):
    waits.touch()
    sleep(HANG_SECONDS)
ranks.time = SimpleNamespace(sleep=wait_for_rank_0)
while os.environ["RANK"] == "0" and not waits.exists():
    sleep(0.01)
run_command(main)
"""

# The tags that users and outside checks rely on; perf/mfu is for GPUs.
TAGS = {
    *("train/loss", "train/nelbo", "train/loss_diffusion", "train/loss_sequential"),
    *("train/grad_norm", "train/learning_rate", "train/skipped_steps"),
    *("perf/tokens_per_second", "perf/tokens_per_second_per_gpu", "perf/step_seconds"),
    *("perf/data_wait_seconds", "perf/memory_gib", "progress/tokens", "progress/flops"),
    *("val/nelbo", "val/perplexity", "val/nelbo_diffusion", "val/nelbo_sequential"),
    *("val/nelbo_stderr", "val_raw/nelbo"),
}
SCALING = {"scaling/val_nelbo_by_flops", "scaling/val_nelbo_by_tokens"}


def run_quickstart(folder: Path) -> str:
    small = {
        "run.directory": f'"{folder / "run"}"',
        "data.train": f'"{folder / "data" / "shards" / "train"}"',
        "data.validation": f'"{folder / "data" / "shards" / "validation"}"',
        "model.num_layers": 2,
        "model.hidden_size": 64,
        "train.num_steps": 8,
        "train.log_interval": 4,
        "optimizer.lr_warmup_steps": 2,
        "validation.num_samples": 96,
    }
    arguments = [f"{key}={value}" for key, value in small.items()]
    finished = subprocess.run(
        [sys.executable, "-m", "pretrain.quickstart", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_SECONDS,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


@pytest.mark.slow
def test_quickstart_trains_converts_and_samples(tmp_path: Path) -> None:
    # What it prints.
    output = run_quickstart(tmp_path)
    found = {
        name: float(value)
        for name, value in re.findall(r"^  (\w+) \w+ +([\d.]+)", output, re.MULTILINE)
    }
    assert found["after"] < found["before"]
    assert abs(math.log(found["before"]) / math.log(2048) - 1) < START_TOLERANCE
    assert found["unigram"] > 1
    for word in (
        "samples",
        "TensorBoard logs",
        "sampler directory",
        "next, plan the paper's 125M run",
    ):
        assert word in output
    # The command at the end works as it is printed.
    (*_, plan) = output.splitlines()
    command = [sys.executable, *shlex.split(plan)[1:]]
    planned = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "# memory of the fullest rank" in planned.stdout
    # What the run has recorded.
    run = RunDirectory(tmp_path / "run")
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert set().union(*records) >= TAGS | SCALING
    scalars = EventAccumulator(str(run.tensorboard)).Reload().Tags()["scalars"]
    assert set(scalars) >= TAGS
    for folder in ("scaling_by_flops", "scaling_by_tokens"):
        assert EventAccumulator(str(run.tensorboard / folder)).Reload().Tags()["scalars"]
    again = run_quickstart(tmp_path)
    assert again.count("kept:") == 5


@pytest.mark.parametrize(
    ("argument", "code", "words"),
    [
        ("model.hiden_size=3", 2, ["model.hiden_size", "hidden_size"]),
        ("parallel.tensor_model_parallel_size=3", 2, ["parallel.tensor_model_parallel_size", "4"]),
        ("train.global_batch_size=7", 2, ["train.global_batch_size = 7", "take a multiple of"]),
        ('data.train="nowhere"', 2, ['data.train = "nowhere"', "data_tools build"]),
        ("data.vocab_size=17", 2, ["data.vocab_size = 17", "train"]),
    ],
)
def test_a_wrong_command_is_one_line(
    argument: str, code: int, words: list[str], tiny_data: Path, tmp_path: Path
) -> None:
    arguments = [*tiny_arguments(tmp_path / "run", tiny_data, {}), argument]
    finished = subprocess.run(
        [sys.executable, "-m", "pretrain.train", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == code
    assert finished.stderr.count("\n") == 1, finished.stderr
    assert finished.stderr.startswith("error: ")
    for word in words:
        assert word in finished.stderr
    assert not (tmp_path / "run").exists()


def test_the_line_of_rank_0_is_not_lost_where_another_rank_ends_first(tmp_path: Path) -> None:
    """Torchrun ends rank 0 as soon as rank 1 has ended; here it starts when rank 1 waits for it."""
    script = tmp_path / "command.py"
    script.write_text(LATE_ON_RANK_0.replace("HANG_SECONDS", str(HANG_SECONDS)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run(
        [sys.executable, *launcher, str(script), "quickstart.toml", "train.num_steps=20"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = {line for line in finished.stderr.splitlines() if line.startswith("error: ")}
    assert len(lines) == 1, finished.stderr
    assert lines.pop().startswith("error: command line: train.num_steps = 20")


def test_a_dry_run_knows_the_vocabulary_of_the_data(tiny_data: Path, tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path / "run", tiny_data, {})
    finished = subprocess.run(
        [sys.executable, "-m", "pretrain.train", *arguments, "--dry-run", "--world-size", "2"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "vocab_size = 400" in finished.stdout
    assert "data 2" in finished.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parallel
def test_a_changed_model_is_refused_on_resume(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "pretrain.train"]
    steps = {"train.num_steps": 2, "validation.num_samples": 4}
    arguments = tiny_arguments(tmp_path / "run", tiny_data, steps)
    world.run(run_loop, 1, tmp_path / "run", tiny_data, steps)
    finished = subprocess.run(
        [*command, *arguments, "run.seed=5"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2
    assert "error: command line: run.seed = 5, but" in finished.stderr
    more = subprocess.run(
        [*command, *arguments, "train.num_steps=3", "optimizer.learning_rate=1e-3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert more.returncode == 0, more.stderr
    assert "optimizer.learning_rate: 0.01 -> 0.001" in more.stderr
    assert '"train/learning_rate": 0.001' in (tmp_path / "run" / "metrics.jsonl").read_text()
