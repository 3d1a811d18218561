"""Which rank a process is: the launcher's number, then that of the process group."""

import os
from unittest import mock

import pytest

from megatron_eso.ranks import is_first_rank, launched_world_size, own_rank
from tests.support.world import World

pytestmark = pytest.mark.parallel


def read_rank(launched: str) -> tuple[int, bool]:
    with mock.patch.dict(os.environ, {"RANK": launched}):
        return own_rank(), is_first_rank()


def test_the_process_group_counts_once_it_exists(world: World) -> None:
    assert world.run(read_rank, 2, "7") == [(0, True), (1, False)]


def test_before_that_the_launcher_counts() -> None:
    assert read_rank("7") == (7, False)
    with mock.patch.dict(os.environ):
        os.environ.pop("RANK", None)
        os.environ.pop("WORLD_SIZE", None)
        assert (own_rank(), is_first_rank(), launched_world_size()) == (0, True, 1)
        os.environ["WORLD_SIZE"] = "4"
        assert launched_world_size() == 4
