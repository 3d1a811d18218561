"""A damaged checkpoint is found and logged, and the run continues from the one before."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_eso.runs.file_index import FILE_INDEX
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.steps import list_checkpoints
from tests.ranks.checkpoints import restore_each
from tests.ranks.loop import run_loop
from tests.ranks.training import train_tiny
from tests.support.processes import HANG_SECONDS
from tests.support.training import DISTRIBUTED, Overrides, tiny_arguments
from tests.support.world import World

NUM_RANKS = 2
OLDER, NEWEST = "step_00000001", "step_00000002"
FILES = (
    *("__0_0.distcp", "__1_0.distcp", ".metadata", "common.pt", "metadata.json"),
    *("config.json", "state.json", FILE_INDEX),
)
SCHEDULE: Overrides = {
    "checkpoint.interval": 2,
    "validation.interval": 2,
    "validation.num_samples": 8,
}


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(random.randrange(path.stat().st_size))


def flip_bit(path: Path) -> None:
    """Anywhere; in the index within its checksum, since not every byte of JSON means something."""
    content = bytearray(path.read_bytes())
    place = random.randrange(len(content))
    if path.name == FILE_INDEX:
        place = content.index(b'"checksum": "') + 13 + random.randrange(32)
    content[place] ^= 1 << random.randrange(8)
    print(f"{path.name}: bit flipped in byte {place}")
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "deleted": Path.unlink,
    "bit flipped": flip_bit,
}


@pytest.mark.parallel
def test_each_file_damaged_in_turn(world: World, tiny_data: Path, tmp_path: Path) -> None:
    for num_steps in (1, 2):
        world.run(train_tiny, NUM_RANKS, tmp_path / "run", tiny_data, DISTRIBUTED, num_steps)
    newest = tmp_path / "run" / "checkpoints" / NEWEST
    assert sorted(path.name for path in newest.iterdir()) == sorted(FILES)
    runs = {}
    for name in FILES:
        for how, damage in DAMAGE.items():
            run = tmp_path / f"{name} {how}"
            shutil.copytree(tmp_path / "run", run)
            damage(run / "checkpoints" / NEWEST / name)
            runs[run] = name
    answers = world.run(restore_each, NUM_RANKS, list(runs), tiny_data, DISTRIBUTED)[0]
    for (run, name), restored in zip(runs.items(), answers, strict=True):
        assert restored.step == 1, run.name
        logged = [line for line in restored.log.splitlines() if "is damaged" in line]
        assert len(logged) == 1, run.name
        assert f"{run}/checkpoints/{NEWEST} is damaged: " in logged[0]
        assert f"/{NEWEST}/{name}: " in logged[0], run.name
        folder = run / "checkpoints"
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            ["latest", OLDER, f"{NEWEST}.damaged"]
        )
        assert (folder / "latest").read_text() == f"{OLDER}\n"


def train(run: Path, data: Path, num_steps: int) -> subprocess.CompletedProcess[str]:
    overrides = SCHEDULE | {"train.num_steps": num_steps}
    return subprocess.run(
        [sys.executable, "-m", "pretrain.train", *tiny_arguments(run, data, overrides)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


@pytest.mark.parallel
@pytest.mark.slow
def test_a_run_continues_from_the_checkpoint_before(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    """The records have no step twice or missing; without a checkpoint the code is 1."""
    world.run(run_loop, 1, tmp_path, tiny_data, SCHEDULE | {"train.num_steps": 6})
    checkpoints = list_checkpoints(tmp_path / "checkpoints")
    flip_bit(checkpoints[-1] / "__0_0.distcp")
    second = train(tmp_path, tiny_data, 8)
    assert second.returncode == 0, second.stderr
    assert f"{checkpoints[-1]}/__0_0.distcp: its hash differs; falling back" in second.stderr
    assert "resuming from" in second.stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 9))
    assert [line["step"] for line in lines if "val/nelbo" in line] == [0, 2, 4, 6, 8]
    for checkpoint in list_checkpoints(tmp_path / "checkpoints"):
        (checkpoint / "state.json").unlink()
    third = train(tmp_path, tiny_data, 10)
    assert third.returncode == 1
    errors = [line for line in third.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "all checkpoints are damaged" in errors[0]
    assert "Traceback" not in third.stderr
    status = RunDirectory(tmp_path).read_status()
    assert status.state == "failed"
    assert "all checkpoints are damaged" in status.reason
