"""How often a training step makes the host wait for the GPU."""

from pathlib import Path

import pytest

from tests.ranks.host_waits import count_waits, count_waits_of_run
from tests.support.training import LAYOUTS, Overrides
from tests.support.world import World

pytestmark = pytest.mark.parallel

SHAPES = "p2p_communication.py:_communicate_shapes"
"""Megatron-Core's pipeline stages exchange the shapes of their tensors, and wait for them."""


@pytest.mark.parametrize(
    "layout", ["1 rank", "TP=2 SP", "PP=2 interleaved", "DP=2", "DP=2 distributed optimizer"]
)
def test_a_step_waits_once(layout: str, world: World, tiny_data: Path, tmp_path: Path) -> None:
    """Losses, gradient norm, finiteness and the requests of any rank come together."""
    num_ranks, overrides = LAYOUTS[layout]
    overrides = overrides | {"train.precision": '"bf16"'}
    for waits, requests in world.run(count_waits, num_ranks, tmp_path, tiny_data, overrides):
        print(f"{layout}: {waits.total()} waits: {dict(waits)}")
        del waits[SHAPES]
        assert waits.total() == 1
        assert requests == (num_ranks - 1, 0)


def test_requests_to_stop_need_no_wait(world: World, tiny_data: Path, tmp_path: Path) -> None:
    """The first steps of a run wait once more, for what an earlier job has validated."""
    overrides: Overrides = {"train.num_steps": 6, "train.log_interval": 10}
    for waits in world.run(count_waits_of_run, 2, tmp_path, tiny_data, overrides):
        print(f"6 steps: {dict(waits)}")
        assert waits["step.py:reduce_step"] == 6
        assert waits["parallel.py:max_over_world"] == 2
