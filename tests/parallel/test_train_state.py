"""The state that training starts from, and steps whose update must not be applied."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_eso.estimates.parameters import count_parameters
from tests.parallel.test_conversion import GATED, LLAMA
from tests.support.training import (
    LAYOUTS,
    OVERLAPPED,
    TP2,
    Overrides,
    open_batches,
    read_checkpoint,
    take_step,
    tiny_config,
    train_tiny,
)
from tests.support.world import World

pytestmark = pytest.mark.parallel


@pytest.mark.parametrize("model", [{}, LLAMA, GATED], ids=["plain", "llama", "gated"])
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


def train_through_damage(run: Path, data: Path, overrides: Overrides, rank: int) -> Any:
    """Two good steps with one in between whose gradient is damaged on one rank."""
    from megatron_eso.training.distributed.cpu_backend import install_cpu_backend

    install_cpu_backend()
    from megatron_eso.training.distributed.parallel import model_parallel_groups
    from megatron_eso.training.steps.step import StepResult
    from megatron_eso.training.steps.train_state import build_train_state

    config = tiny_config(run, data, overrides)
    damage = torch.distributed.get_rank() == rank

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, math.nan)

    with model_parallel_groups(config.parallel) as groups:
        batches = open_batches(config, groups.dp.size())
        state = build_train_state(config, groups)
        weight = next(p for p in state.parameters if "linear_fc2.weight" in p.sharded.key).model

        def take_next_step() -> StepResult:
            return take_step(config, state, batches, groups)

        results = [take_next_step()]
        before = [p.main.detach().clone() for p in state.parameters if p.main is not None]
        hook = weight.register_hook(spoil) if damage else None
        results.append(take_next_step())
        if hook is not None:
            hook.remove()
        mains = [p.main for p in state.parameters if p.main is not None]
        unchanged = all(torch.equal(a, b) for a, b in zip(before, mains, strict=True))
        assert state.ema is not None
        updates_while_damaged = state.ema.num_updates
        results.append(take_next_step())
        changed = any(not torch.equal(a, b) for a, b in zip(before, mains, strict=True))
    skipped = [result.skipped for result in results]
    return skipped, unchanged, changed, updates_while_damaged, state.counters, results[2].loss


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
