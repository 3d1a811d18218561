"""A resumed run is the uninterrupted one: bitwise on its layout, within rounding on another."""

from pathlib import Path

import pytest
import torch

from megatron_eso.errors import CheckpointError
from tests.ranks.loop import run_loop
from tests.ranks.training import resave, train_tiny
from tests.support.torchrun import read_records
from tests.support.training import (
    DISTRIBUTED,
    ESO_LM_A,
    FAMILY,
    INTERLEAVED,
    OVERLAPPED,
    PP2,
    TP2,
    Overrides,
    read_checkpoint,
)
from tests.support.world import RankError, World

pytestmark = pytest.mark.parallel

NUM_STEPS, RESUMED_AT = 6, 3
LOSS_TOLERANCE = 1e-5  # relative, where the layout changes
SEQUENCE_PARALLEL = TP2 | {"parallel.sequence_parallel": "true"}
DROPOUT: Overrides = {"model.hidden_dropout": 0.1}
BF16: Overrides = {"train.precision": '"bf16"'}
NO_PREFETCH: Overrides = {"data.prefetch_steps": 0}

SAME: dict[str, Overrides] = {
    "TP=2 SP, dropout": SEQUENCE_PARALLEL | DROPOUT,
    "PP=2 interleaved, dropout": INTERLEAVED | DROPOUT,
    "DP=2, cut short, framed": {"data.ssl_ratio": 0.5, "data.framing": '"bos_eos"'},
    "DP=2 distributed optimizer, bf16": DISTRIBUTED | BF16,
    "DP=2 overlapped, MDLM": OVERLAPPED | FAMILY["mdlm"],
    "DP=2 overlapped, bf16, dropout": OVERLAPPED | BF16 | DROPOUT,
    "DP=2 bf16, recomputed, dropout": BF16 | DROPOUT | {"train.recompute_granularity": '"full"'},
    "PP=2, BD3-LM": PP2 | FAMILY["bd3_lm"],
    "DP=2, AR, documents": FAMILY["ar"] | {"data.document_attention": "true"},
    "TP=2 SP, variant A": SEQUENCE_PARALLEL | ESO_LM_A,
    "DP=2, Set Diffusion": FAMILY["set_dlm"],
    "PP=2, any-order AR": PP2 | FAMILY["any_order_ar"],
    "PP=2, next-token rows": PP2 | FAMILY["eso_lm next"] | {"objective.alpha_0_warmup_steps": 3},
}
CHANGED: dict[str, tuple[Overrides, Overrides]] = {
    "TP=2 to PP=2": (TP2, PP2),
    "PP=2 interleaved to DP=2 overlapped": (INTERLEAVED, OVERLAPPED),
    "DP=2 distributed optimizer to TP=2 SP": (DISTRIBUTED, SEQUENCE_PARALLEL),
    "DP=2 to DP=2 distributed optimizer": ({}, DISTRIBUTED),
}


@pytest.mark.parametrize("case", SAME)
def test_resumed_run_is_bitwise_the_uninterrupted_one(
    case: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    """The one reads each step's data at once, the other ahead."""
    overrides = SAME[case]
    at_once = overrides | NO_PREFETCH
    straight = world.run(train_tiny, 2, tmp_path / "a", tiny_data, at_once, NUM_STEPS)[0]
    first = world.run(train_tiny, 2, tmp_path / "b", tiny_data, overrides, RESUMED_AT)[0]
    second = world.run(train_tiny, 2, tmp_path / "b", tiny_data, overrides, NUM_STEPS)[0]
    assert first.losses + second.losses == straight.losses
    assert first.grad_norms + second.grad_norms == straight.grad_norms
    expected, found = read_checkpoint(straight.checkpoint), read_checkpoint(second.checkpoint)
    assert expected.keys() == found.keys()
    assert any(name.startswith("ema.") for name in found)
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("case", CHANGED)
def test_run_continues_at_another_layout(
    case: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    before, after = CHANGED[case]
    straight = world.run(train_tiny, 2, tmp_path / "a", tiny_data, before, NUM_STEPS)[0]
    world.run(train_tiny, 2, tmp_path / "b", tiny_data, before, RESUMED_AT)
    resumed = world.run(train_tiny, 2, tmp_path / "b", tiny_data, after, NUM_STEPS)[0]
    assert resumed.losses == pytest.approx(straight.losses[RESUMED_AT:], rel=LOSS_TOLERANCE)
    assert resumed.grad_norms == pytest.approx(straight.grad_norms[RESUMED_AT:], rel=LOSS_TOLERANCE)


def test_records_continue_at_another_layout(world: World, tiny_data: Path, tmp_path: Path) -> None:
    """The whole command's way: one job at TP=2, then one at DP=2 with overlapped collectives."""
    schedule: Overrides = {"validation.interval": RESUMED_AT, "validation.num_samples": 8}
    end: Overrides = {"train.num_steps": RESUMED_AT}
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    world.run(run_loop, 2, straight, tiny_data, schedule | TP2 | {"train.num_steps": NUM_STEPS})
    world.run(run_loop, 2, moved, tiny_data, schedule | TP2 | end)
    world.run(run_loop, 2, moved, tiny_data, schedule | OVERLAPPED | {"train.num_steps": NUM_STEPS})
    found, expected = read_records(moved), read_records(straight)
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for key in ("train/loss", "val/nelbo"):
        assert [record[key] for record in found if key in record] == pytest.approx(
            [record[key] for record in expected if key in record], rel=LOSS_TOLERANCE
        )


def test_checkpoints_do_not_depend_on_the_layout(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    """Load one state in every layout, and save it there: the tensors are the same."""
    first = world.run(train_tiny, 1, tmp_path / "a", tiny_data, {}, RESUMED_AT)[0]
    expected = read_checkpoint(first.checkpoint)
    for number, overrides in enumerate((TP2, INTERLEAVED, OVERLAPPED)):
        run = tmp_path / str(number)
        folder = run / "checkpoints" / first.checkpoint.name
        folder.parent.mkdir(parents=True)
        folder.symlink_to(first.checkpoint)
        world.run(resave, 2, run, tiny_data, overrides, run / "again")
        found = read_checkpoint(run / "again" / first.checkpoint.name)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def test_a_damaged_checkpoint_is_one_line(world: World, tiny_data: Path, tmp_path: Path) -> None:
    trained = world.run(train_tiny, 1, tmp_path, tiny_data, {}, RESUMED_AT)[0]
    (part,) = trained.checkpoint.glob("*.distcp")
    part.write_bytes(part.read_bytes()[:-1000])
    with pytest.raises(RankError) as raised:
        world.run(train_tiny, 1, tmp_path, tiny_data, {}, NUM_STEPS)
    assert isinstance(raised.value.__cause__, CheckpointError)
    assert "all checkpoints are damaged" in str(raised.value.__cause__)
