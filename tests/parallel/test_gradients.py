"""What a step computes with its gradients."""

from pathlib import Path

import pytest

from tests.ranks.gradients import watch_step
from tests.support.training import LAYOUTS
from tests.support.world import World

pytestmark = pytest.mark.parallel


@pytest.mark.parametrize("layout", ["TP=2 SP", "DP=2", "DP=2 distributed optimizer"])
def test_gradients_are_neither_scaled_nor_sorted(
    layout: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    """Scaling before the reduction is a pass over all of them; indexed rows were sorted."""
    num_ranks, overrides = LAYOUTS[layout]
    for found in world.run(watch_step, num_ranks, tmp_path, tiny_data, overrides):
        scaled = sum(size for size in found.multiplied if size in found.buckets)
        num_sorted = found.num_accumulated
        print(f"{layout}: {sum(found.buckets)} elements, {scaled} scaled, {num_sorted} sorts")
        assert scaled == 0
        assert num_sorted == 0
