"""How much of a checkpoint is read on another layout."""

from pathlib import Path

import pytest

from tests.ranks.reading import read_state
from tests.ranks.training import train_tiny
from tests.support.training import DISTRIBUTED, TP2, Overrides
from tests.support.world import World

pytestmark = pytest.mark.parallel

WIDE: Overrides = {"model.hidden_size": 256, "model.num_layers": 2}
TARGETS: dict[str, tuple[int, Overrides]] = {
    "DP=4 distributed optimizer": (4, DISTRIBUTED),
    "TP=2, DP=2 distributed optimizer": (4, TP2 | DISTRIBUTED),
    "TP=2 SP, DP=2": (4, TP2 | {"parallel.sequence_parallel": "true"}),
    "DP=2": (2, {}),
}


@pytest.fixture(scope="module")
def checkpoint(world: World, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("wide")
    return world.run(train_tiny, 1, run, tiny_data, WIDE, 1)[0].checkpoint  # type: ignore[no-any-return]


@pytest.mark.parametrize("target", TARGETS)
def test_at_most_twice_the_needed_bytes_are_read(
    target: str, checkpoint: Path, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    num_ranks, overrides = TARGETS[target]
    answers = world.run(read_state, num_ranks, tmp_path, tiny_data, WIDE | overrides, checkpoint)
    read, needed = (sum(getattr(each, kind) for each in answers) for kind in ("read", "needed"))
    print(f"{target}: read {read} bytes for {needed}: {read / needed:.2f}")
    assert read <= 2 * needed
