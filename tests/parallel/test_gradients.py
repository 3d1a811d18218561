"""The gradients of a step before the update."""

from pathlib import Path

import pytest

from tests.ranks.gradients import count_scaled_elements
from tests.support.training import LAYOUTS
from tests.support.world import World

pytestmark = pytest.mark.parallel


@pytest.mark.parametrize("layout", ["DP=2", "DP=2 distributed optimizer"])
def test_gradients_are_summed_without_being_scaled(
    layout: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    """A multiplication of all gradients before their reduction costs a pass over the memory."""
    num_ranks, overrides = LAYOUTS[layout]
    answers = world.run(count_scaled_elements, num_ranks, tmp_path, tiny_data, overrides)
    print(f"{layout}: elements of gradients and elements multiplied: {answers}")
    assert all(held > 0 and scaled == 0 for held, scaled in answers)
