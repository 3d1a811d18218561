"""The data that a run keeps from checkpoint to checkpoint, and what may change on resume."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from megatron_eso.data.shards.manifest import read_manifest
from megatron_eso.errors import ConfigError
from tests.ranks.training import train_tiny
from tests.support.training import TP2, Overrides
from tests.support.world import RankError, World

pytestmark = pytest.mark.parallel

NUM_STEPS = 2


def blend(data: Path, weights: str, phase: int = 1) -> Overrides:
    """Return the overrides for a blend of both splits."""
    return {
        "data.train": json.dumps([str(data / "train"), str(data / "validation")]),
        "data.train_weights": weights,
        "data.phase": phase,
    }


def read_phases(checkpoint: Path) -> list[tuple[int, list[int]]]:
    """Start and quotas of the phases that a checkpoint records."""
    state = json.loads((checkpoint / "state.json").read_text())
    return [(phase["start"], phase["quotas"]) for phase in state["data"]["phases"]]


def refuse(world: World, run: Path, data: Path, overrides: Overrides) -> str:
    """Return the line with which every rank refuses before it takes a step."""
    with pytest.raises(RankError) as raised:
        world.run(train_tiny, 1, run, data, overrides, 3 * NUM_STEPS)
    assert isinstance(raised.value.__cause__, ConfigError)
    return str(raised.value.__cause__)


@pytest.fixture(scope="module")
def other_tokenizer(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the tiny data as if another tokenizer of the same size had made them."""
    folder = tmp_path_factory.mktemp("other_tokenizer") / "shards"
    shutil.copytree(tiny_data, folder)
    for split in ("train", "validation"):
        manifest, _ = read_manifest(folder / split)
        tokenizer = dataclasses.replace(manifest.tokenizer, pieces_sha256="f" * 64)
        changed = dataclasses.replace(manifest, tokenizer=tokenizer)
        (folder / split / "manifest.json").write_bytes(changed.encode())
    return folder


def test_a_change_of_blend_is_deliberate(world: World, tiny_data: Path, tmp_path: Path) -> None:
    first = blend(tiny_data, "[3, 1]")
    trained = world.run(train_tiny, 2, tmp_path, tiny_data, first | TP2, NUM_STEPS)[0]
    assert read_phases(trained.checkpoint) == [(0, [3072, 1024])]
    line = refuse(world, tmp_path, tiny_data, blend(tiny_data, "[1, 1]"))
    assert "set data.phase = 2" in line
    assert f"checkpoint.init_from = {trained.checkpoint}" in line
    changed = blend(tiny_data, "[1, 1]", phase=2)
    trained = world.run(train_tiny, 2, tmp_path, tiny_data, changed, 2 * NUM_STEPS)[0]
    expected = [(0, [3072, 1024]), (4096, [2048, 2048])]
    assert read_phases(trained.checkpoint) == expected
    trained = world.run(train_tiny, 1, tmp_path, tiny_data, changed, 3 * NUM_STEPS)[0]
    assert read_phases(trained.checkpoint) == expected


def test_another_dataset_framing_or_tokenizer_is_refused_on_resume(
    world: World, tiny_data: Path, other_tokenizer: Path, tmp_path: Path
) -> None:
    world.run(train_tiny, 1, tmp_path, tiny_data, {}, NUM_STEPS)
    validation: Overrides = {"data.train": json.dumps(str(tiny_data / "validation"))}
    assert "set data.phase = 2" in refuse(world, tmp_path, tiny_data, validation)
    framed: Overrides = {"data.framing": "bos_eos"}
    assert 'data.framing = "bos_eos"' in refuse(world, tmp_path, tiny_data, framed)
    line = refuse(world, tmp_path, other_tokenizer, {})
    assert "its tokenizer is not that of" in line
    assert "checkpoint.init_other_tokenizer = true" in line


def test_another_objective_is_refused_on_resume(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    world.run(train_tiny, 1, tmp_path, tiny_data, {}, NUM_STEPS)
    other: Overrides = {"objective.name": "any_order_ar", "objective.alpha_0": 0.125}
    line = refuse(world, tmp_path, tiny_data, other)
    assert line.startswith('objective.name = "any_order_ar", but ')
    assert line.endswith("restore the value or choose another run.directory")


def test_weights_of_another_tokenizer_are_taken_deliberately(
    world: World, tiny_data: Path, other_tokenizer: Path, tmp_path: Path
) -> None:
    trained = world.run(train_tiny, 1, tmp_path / "a", tiny_data, {}, NUM_STEPS)[0]
    start: Overrides = {"checkpoint.init_from": json.dumps(str(tmp_path / "a"))}
    line = refuse(world, tmp_path / "b", other_tokenizer, start)
    assert line.startswith(f"checkpoint.init_from = {trained.checkpoint}: these weights")
    assert "checkpoint.init_other_tokenizer = true" in line
    deliberate = start | {"checkpoint.init_other_tokenizer": "true"}
    world.run(train_tiny, 1, tmp_path / "b", other_tokenizer, deliberate, NUM_STEPS)
