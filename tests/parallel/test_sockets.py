"""Sockets of a rank do not grow with the world, whose number of ranks may exceed `ulimit -n`."""

from functools import partial

import pytest

from tests.ranks.sockets import count_new_sockets
from tests.support.world import World

pytestmark = pytest.mark.parallel


@pytest.mark.parametrize(("num_ranks", "num_neighbours"), [(2, 1), (3, 2), (4, 2)])
def test_a_group_opens_sockets_to_its_neighbours_alone(
    world: World, num_ranks: int, num_neighbours: int
) -> None:
    counts = world.run(partial(count_new_sockets, has_defaults=True), num_ranks)
    assert counts == [(1, 1 + num_neighbours)] * num_ranks  # one listens


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_without_the_default_a_group_opens_sockets_to_all_ranks(
    world: World, num_ranks: int
) -> None:
    counts = world.run(partial(count_new_sockets, has_defaults=False), num_ranks)
    assert counts == [(num_ranks, num_ranks)] * num_ranks
