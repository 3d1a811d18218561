"""The state that training starts from, and steps whose update must not be applied."""

import math
from pathlib import Path

import pytest
import torch

from megatron_eso.estimates.parameters import count_parameters
from tests.ranks.training import train_through_damage, train_tiny
from tests.support.training import (
    GATED,
    LAYOUTS,
    LLAMA,
    OVERLAPPED,
    SCALED,
    TP2,
    Overrides,
    read_checkpoint,
    tiny_config,
)
from tests.support.world import World

pytestmark = pytest.mark.parallel


@pytest.mark.parametrize("model", [{}, LLAMA | SCALED, GATED], ids=["plain", "llama", "gated"])
def test_every_layout_starts_from_the_same_values(
    model: Overrides, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    one = world.run(train_tiny, 1, tmp_path / "one", tiny_data, model, 0)[0]
    expected = read_checkpoint(one.checkpoint)
    for number, layout in enumerate(("TP=2 SP", "PP=2 interleaved", "DP=2 distributed optimizer")):
        run = tmp_path / str(number)
        overrides = model | LAYOUTS[layout][1]
        found = read_checkpoint(
            world.run(train_tiny, 2, run, tiny_data, overrides, 0)[0].checkpoint
        )
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (layout, name)
    config = tiny_config(tmp_path, tiny_data, model)
    assert config.data.vocab_size is not None
    weights = [t.numel() for name, t in expected.items() if not name.startswith(("opt", "ema."))]
    assert sum(weights) == count_parameters(config.model, config.data.vocab_size).total


@pytest.mark.parametrize("overrides", [TP2, {}, OVERLAPPED], ids=["TP=2", "DP=2", "overlapped"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_gradient_that_is_not_finite_is_skipped_on_all_ranks(
    rank: int, overrides: Overrides, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    for answer in world.run(train_through_damage, 2, tmp_path, tiny_data, overrides, rank):
        skipped, unchanged, changed, updates, counters, loss = answer
        assert skipped == [False, True, False]
        assert unchanged
        assert changed
        assert updates == 1
        assert (counters.step, counters.skipped_steps, counters.consumed_samples) == (3, 1, 24)
        assert math.isfinite(loss)
