"""The memory that saves in the background take."""

from pathlib import Path

import pytest

from tests.ranks.host_copies import measure_memory
from tests.support.training import LAYOUTS
from tests.support.world import World

pytestmark = pytest.mark.parallel


@pytest.mark.parametrize("layout", ["1 rank", "DP=2 distributed optimizer"])
def test_copies_lie_in_one_block_and_no_moment_is_made_anew(
    layout: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    """Pinned memory is taken by block, each with its own call and its own rounding."""
    num_ranks, overrides = LAYOUTS[layout]
    overrides = overrides | {"checkpoint.interval": 2}
    for memory in world.run(measure_memory, num_ranks, tmp_path, tiny_data, overrides):
        print(f"{layout}: {memory}")
        assert memory.blocks == 1
        assert memory.bytes_copied <= memory.bytes_spanned <= 1.05 * memory.bytes_copied
        assert memory.zeros == 0
