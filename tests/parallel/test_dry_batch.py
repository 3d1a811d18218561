"""The largest micro-batch: no smaller than any that comes, and no trace of it afterwards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks.batches import raise_shortage, run_dry
from tests.ranks.training import open_batches
from tests.support.training import LAYOUTS, OVERLAPPED, Overrides, tiny_config
from tests.support.world import World

pytestmark = pytest.mark.parallel

NUM_MICRO_BATCHES = 200


def count_rows(batch: Any) -> dict[str, int]:
    """Return the sizes that memory depends on."""
    return {
        "rows": len(batch.rows.tokens_R),
        "loss rows": len(batch.loss.targets_E),
        # What attention without a fused kernel holds.
        "pairs": sum(span.num_rows * span.num_keys for span in batch.rows.spans),
    }


PLANS: dict[str, Overrides] = {
    "mixed": {},
    "of one phase": {"train.micro_batch_size": 1},
    "three to one": {"objective.batch_split": 0.75, "train.micro_batch_size": 4},
    "cut short, framed": {"data.ssl_ratio": 0.5, "data.framing": '"bos_eos"'},
    "diffusion": {"objective.alpha_0": 1},
    "sequential": {"objective.alpha_0": 0},
    "padded": LAYOUTS["TP=2 SP"][1],
}


@pytest.mark.parametrize("case", PLANS)
def test_no_micro_batch_is_larger(case: str, tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tiny_data, PLANS[case])
    batches = open_batches(config, 1)
    largest = count_rows(batches.plan_largest())
    draw, seen = np.random.default_rng(0), 0
    while seen < NUM_MICRO_BATCHES:
        step = int(draw.integers(10_000))
        place = batches.step(step, step * config.train.global_batch_size)
        for micro_batch in batches.plan_step(place, 0).micro_batches:
            found = count_rows(micro_batch)
            assert all(found[name] <= largest[name] for name in largest), (found, largest)
            seen += 1
    length, size = config.data.sequence_length, config.train.micro_batch_size
    if case == "sequential":
        assert largest["rows"] == size * (2 * length - 1)
    if case == "diffusion":
        assert largest["rows"] == largest["loss rows"] == size * length


@pytest.mark.parametrize("layout", [*LAYOUTS, "DP=2 overlapped", "DP=2 bf16, dropout"])
def test_it_leaves_no_trace(layout: str, world: World, tiny_data: Path, tmp_path: Path) -> None:
    others = {
        "DP=2 overlapped": (2, OVERLAPPED),
        "DP=2 bf16, dropout": (
            2,
            {"train.precision": '"bf16"', "model.hidden_dropout": 0.1},
        ),
    }
    num_ranks, overrides = (LAYOUTS | others)[layout]
    tried = world.run(run_dry, num_ranks, tmp_path, tiny_data, overrides, True)
    plain = world.run(run_dry, num_ranks, tmp_path, tiny_data, overrides, False)
    for (before, after, losses, end), (_, _, expected_losses, expected) in zip(
        tried, plain, strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert losses == expected_losses
        assert all(torch.equal(a, b) for a, b in zip(end, expected, strict=True))


def test_the_error_names_the_levers(world: World, tiny_data: Path, tmp_path: Path) -> None:
    error = world.run(raise_shortage, 1, tmp_path, tiny_data, {})[0]
    assert "\n" not in error
    for lever in (
        "beyond 4.0 GiB",
        "71 rows of train.micro_batch_size = 2 samples of data.sequence_length = 24",
        'train.recompute_granularity = "full"',
        "parallel.tensor_model_parallel_size = 1",
        "parallel.pipeline_model_parallel_size = 1",
        "parallel.use_distributed_optimizer = false",
    ):
        assert lever in error
