"""Initial weights: the same on every layout, and no more drawn than a rank holds."""

from pathlib import Path

import pytest

from tests.ranks.initial_weights import start
from tests.support.training import DISTRIBUTED, LAYOUTS, LLAMA, PP2, TP2, Overrides
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
