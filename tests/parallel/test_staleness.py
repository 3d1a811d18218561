"""Saves are alive: what moved has moved in the checkpoint, and a tensor that is stale is found."""

from pathlib import Path

import pytest
import torch

from megatron_eso.runs.checkpoint import PREFIXES
from megatron_eso.runs.steps import list_checkpoints, step_name, step_number
from tests.ranks.staleness import (
    save_cut_off,
    save_each_step,
    save_stale_copies,
    save_without_updates,
)
from tests.support.training import DISTRIBUTED, OVERLAPPED, Overrides, read_checkpoint
from tests.support.world import World

pytestmark = pytest.mark.parallel

BF16: Overrides = {"train.precision": '"bf16"'}
LAYOUTS: dict[str, Overrides] = {
    "DP=2": {},
    "DP=2 bf16": BF16,
    "DP=2 distributed optimizer, bf16": DISTRIBUTED | BF16,
    "DP=2 overlapped, bf16": OVERLAPPED | BF16,
}
NUM_STEPS = 4
STALE = "is not the state at the moment of the save"
STILL = "not changed since the previous save"


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_successive_checkpoints_differ_in_every_tensor(
    layout: str, in_background: bool, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    """Check weights, both moments and the average: each of them changes in these steps."""
    arguments = (tmp_path, tiny_data, LAYOUTS[layout], NUM_STEPS, in_background)
    assert world.run(save_each_step, 2, *arguments) == [[], []]
    written = list_checkpoints(tmp_path / "checkpoints")
    assert len(written) == NUM_STEPS
    before = read_checkpoint(written[0])
    for kind in PREFIXES.values():
        assert any(name.startswith(kind) for name in before)
    for checkpoint in written[1:]:
        now = read_checkpoint(checkpoint)
        assert now.keys() == before.keys()
        still = [name for name, tensor in now.items() if torch.equal(tensor, before[name])]
        assert still == [], checkpoint.name
        before = now


HONEST: dict[str, Overrides] = {
    "tokens that do not occur": BF16 | {"optimizer.weight_decay": 0.0, "train.num_steps": 12},
    "closed residual gates": {"model.residual_gates": "true"},
    "closed residual gates, bf16": DISTRIBUTED | BF16 | {"model.residual_gates": "true"},
    "a learning rate too small for any bit": {"optimizer.learning_rate": 1e-30},
    "the same in bf16": OVERLAPPED | BF16 | {"optimizer.learning_rate": 1e-30},
    "a slow average": {"optimizer.ema_decay": 0.9999999, "optimizer.learning_rate": 1e-6},
}


@pytest.mark.parametrize("case", HONEST)
def test_what_may_stand_still_is_not_suspected(
    case: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    overrides = HONEST[case]
    num_steps = overrides.get("train.num_steps", NUM_STEPS)
    arguments = (tmp_path, tiny_data, overrides, num_steps, True)
    assert world.run(save_each_step, 2, *arguments) == [[], []]


def test_without_an_update_nothing_is_expected(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    found = world.run(save_without_updates, 2, tmp_path, tiny_data, DISTRIBUTED | BF16)
    assert found == [[], []]
    steps = [step_number(path) for path in list_checkpoints(tmp_path / "checkpoints")]
    assert steps == [1, 2, 5]


@pytest.mark.parametrize("how", ["not refreshed", "overwritten"])
@pytest.mark.parametrize("overrides", [{}, DISTRIBUTED | BF16], ids=["plain", "distributed"])
def test_copies_that_are_not_the_state_fail_the_save(
    how: str, overrides: Overrides, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    for failure, after in world.run(save_stale_copies, 2, tmp_path, tiny_data, overrides, how):
        assert failure is not None
        assert failure.startswith("step_00000002 could not be saved: what was written of ")
        assert STALE in failure
        assert how == "not refreshed" or "ema." in failure
        assert after is None
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == [step_name(1), step_name(2)]


@pytest.mark.parametrize("what", PREFIXES.values())
def test_what_is_cut_off_from_the_network_is_logged_and_saved(
    what: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    for lines in world.run(save_cut_off, 2, tmp_path, tiny_data, DISTRIBUTED | BF16, what):
        (line,) = lines
        assert line.startswith(f"step_00000002: {what}")
        assert STILL in line
        assert " more: " in line
        for other in set(PREFIXES.values()) - {what, ""}:
            assert other not in line
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == [step_name(1), step_name(2)]
