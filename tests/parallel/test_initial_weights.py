"""Initial weights: the same on every layout, no more drawn than a rank holds, and their loss."""

import math
from pathlib import Path

import pytest
import torch

from megatron_eso.batches.loss import normalize_phases, sum_phases
from tests.ranks.initial_weights import start
from tests.ranks.training import open_batches, train_tiny
from tests.support.training import (
    DISTRIBUTED,
    ESO_LM_A,
    FAMILY,
    GATED,
    LAYOUTS,
    LLAMA,
    PP2,
    TP2,
    Overrides,
    tiny_config,
)
from tests.support.world import World

pytestmark = pytest.mark.parallel

TARGETS: dict[str, tuple[int, Overrides]] = LAYOUTS | {
    "TP=2, DP=2 distributed optimizer": (4, TP2 | DISTRIBUTED),
    "PP=2 tied, DP=2": (4, PP2 | LLAMA),
}


@pytest.mark.parametrize("layout", TARGETS)
def test_a_rank_draws_what_it_holds(
    layout: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    num_ranks, overrides = TARGETS[layout]
    for answer in world.run(start, num_ranks, tmp_path, tiny_data, overrides):
        print(f"{layout}: drawn {answer.drawn}, held {answer.held}")
        assert answer.drawn <= 1.1 * answer.held
    for answer in world.run(start, num_ranks, tmp_path, tiny_data, overrides):
        assert answer.drawn == 0  # the run continues from a checkpoint


@pytest.mark.parametrize("name", ["eso_lm", "eso_lm a", *FAMILY])
def test_the_first_loss_of_a_head_of_zeros_is_that_of_uniform_predictions(
    name: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    overrides = GATED | ({"eso_lm": {}, "eso_lm a": ESO_LM_A} | FAMILY)[name]
    (trained,) = world.run(train_tiny, 1, tmp_path, tiny_data, overrides, 1)
    # The loss of the same step if each predicted token has the loss ln(V - 1).
    config = tiny_config(tmp_path, tiny_data, overrides)
    batches = open_batches(config, 1)
    plan = batches.plan_step(batches.step(0, 0), 0)
    sums_P = torch.zeros(len(plan.tokens), dtype=torch.float64)
    for batch in plan.micro_batches:
        ones_E = torch.ones(batch.loss.num_real, dtype=torch.float64)
        weights_E = batch.loss.weights_E.double()
        sums_P += sum_phases(ones_E, weights_E, batch.loss, len(sums_P))
    factor = batches.objective.combine(normalize_phases(sums_P, plan.tokens)).item()
    expected = factor * math.log(config.data.vocabulary.size - 1)
    assert trained.losses[0] == pytest.approx(expected, rel=1e-5)
