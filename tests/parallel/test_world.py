"""The test workers themselves: collectives, failures of every kind, and their recovery."""

from pathlib import Path

import pytest

from tests.ranks.training import train_tiny
from tests.ranks.world import (
    add_up,
    count_threads,
    describe_process,
    die_on_one_rank,
    fail_on_one_rank,
    find_loaded,
    hang_on_one_rank,
    return_what_does_not_pickle,
)
from tests.support.world import RankError, World, WorldTimeoutError

pytestmark = pytest.mark.parallel


@pytest.mark.parametrize(("num_ranks", "total"), [(1, 5), (2, 11), (3, 18)])
def test_ranks_add_up(world: World, num_ranks: int, total: int) -> None:
    assert world.run(add_up, num_ranks, 5) == [total] * num_ranks


def test_processes_stay_alive_and_use_one_thread(world: World) -> None:
    rejoins = world.num_rejoins
    first, second = (world.run(describe_process, 2) for _ in range(2))
    assert first == second or world.num_rejoins > rejoins
    assert len({pid for pid, _, _ in first}) == 2
    assert all((threads, variable) == (1, "1") for _, threads, variable in first)


def test_megatron_is_imported_without_a_compiler(world: World) -> None:
    compiler = ("torch._inductor.compile_fx", "triton")
    assert world.run(find_loaded, 1, "megatron.core", *compiler) == [["megatron.core"]]


def test_a_call_leaves_no_threads_of_its_groups(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    rejoins, counts = world.num_rejoins, []
    for number in range(2):
        world.run(train_tiny, 2, tmp_path / str(number), tiny_data, {}, 1)
        counts.append(max(world.run(count_threads, 2)))
    assert counts[1] <= counts[0] or world.num_rejoins > rejoins


def test_an_exception_names_its_rank_and_keeps_the_pool(world: World) -> None:
    before, rejoins = world.run(describe_process, 2), world.num_rejoins
    with pytest.raises(RankError, match=r"(?s)rank 1: .*no such slot") as raised:
        world.run(fail_on_one_rank, 2, 1)
    assert isinstance(raised.value.__cause__, KeyError)
    assert world.run(describe_process, 2) == before or world.num_rejoins > rejoins


def test_a_result_that_does_not_pickle_is_a_failure(world: World) -> None:
    with pytest.raises(RankError, match="pickle"):
        world.run(return_what_does_not_pickle, 1)


def test_a_death_fails_one_call(world: World) -> None:
    with pytest.raises(RankError, match="rank 1: its process died"):
        world.run(die_on_one_rank, 2, 1)
    assert world.run(add_up, 2, 0) == [1, 1]


def test_a_hang_fails_one_call(world: World) -> None:
    with pytest.raises(WorldTimeoutError, match=r"ranks \[0, 1\] did not return in 2 s"):
        world.run(hang_on_one_rank, 2, 1, timeout_seconds=2.0)
    assert world.run(add_up, 2, 0) == [1, 1]
