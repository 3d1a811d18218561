"""The faults that the pre-flight finds in facts and measurements, and the nodes that it names."""

import dataclasses
import threading
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from megatron_eso.errors import UserError
from pretrain.preflight.measurement import Measurement, Rank, measure_together
from pretrain.preflight.meeting import World
from pretrain.preflight.node_facts import NodeFacts, RankFacts, count_devices
from pretrain.preflight.places import MAX_ROUNDS, Places, pair_up
from pretrain.preflight.verdict import (
    Limits,
    find_slow_pairs,
    judge_gpus,
    judge_measurements,
    judge_nodes,
    pair_bandwidths,
)

LIMITS = Limits(clock_skew_seconds=2.0, free_gib=1.0, bandwidth=0.0, share=0.7, may_idle=False)


def node(name: str, **changes: object) -> NodeFacts:
    facts = NodeFacts(
        node=name,
        num_devices=8,
        gpu="GPU",
        versions={"python": "3.12.1", "torch": "2.13"},
        free_gib=100.0,
        disk_error="",
    )
    return dataclasses.replace(facts, **changes)  # type: ignore[arg-type]


def ranks(name: str, num_ranks: int, num_gpus: int, *, own_only: bool = False) -> list[RankFacts]:
    gpus = tuple(f"{name}-{index}" for index in range(num_gpus))
    return [
        RankFacts(
            node=name,
            gpu=gpus[rank] if rank < num_gpus else "",
            visible_gpus=gpus[rank : rank + 1] if own_only else gpus,
        )
        for rank in range(num_ranks)
    ]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"gpu": "another"}, "node n2: the GPU another, elsewhere GPU"),
        (
            {"versions": {"python": "3.12.1", "torch": "2.12"}},
            "node n2: torch 2.12, elsewhere 2.13",
        ),
        (
            {"free_gib": 0.5},
            "node n2: 0.5 GiB free for the run directory, needs 1 (--min-free-gib)",
        ),
        ({"disk_error": "cannot write into runs"}, "node n2: cannot write into runs"),
    ],
)
def test_the_node_that_differs_is_named(changes: dict[str, object], fault: str | None) -> None:
    found = judge_nodes([node("n1"), node("n2", **changes), node("n3")], LIMITS)
    assert found == ([] if fault is None else [fault])


@pytest.mark.parametrize(
    ("of_second", "faults"),
    [
        (ranks("n2", 8, 8), []),
        (ranks("n2", 8, 8, own_only=True), []),
        (ranks("n2", 8, 7), ["node n2: GPUs 7, elsewhere 8", "node n2: 8 ranks on 7 GPUs"]),
        (
            [dataclasses.replace(each, gpu="n2-0") for each in ranks("n2", 8, 8)],
            ["node n2: 8 ranks on 1 GPUs"],
        ),
        (
            ranks("n2", 1, 8),
            ["node n2: ranks on 1 of 8 GPUs: RANKS_PER_NODE=8 uses all (--allow-idle-gpus)"],
        ),
        (
            ranks("n2", 8, 0),
            [
                "node n2: torch sees none of 8 GPUs: a CPU build of torch, the driver, or a "
                "container without --nv"
            ],
        ),
    ],
)
def test_ranks_and_gpus_fit(of_second: list[RankFacts], faults: list[str]) -> None:
    nodes = [node("n1"), node("n2"), node("n3")]
    everyone = [*ranks("n1", 8, 8), *of_second, *ranks("n3", 8, 8)]
    assert judge_gpus(nodes, everyone, LIMITS) == faults


def test_idle_gpus_can_be_allowed() -> None:
    allowed = dataclasses.replace(LIMITS, may_idle=True)
    assert judge_gpus([node("n1")], ranks("n1", 1, 8), allowed) == []


def test_gpus_are_counted_by_slurm_or_device_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert count_devices(tmp_path) == 2
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")
    assert count_devices(tmp_path) == 1


@pytest.mark.parametrize(
    ("measurement", "fault"),
    [
        (Measurement(node="n2", world_bandwidth=3.0), None),
        (
            Measurement(node="n2", world_bandwidth=3.0, clock_skew_seconds=-7.0),
            "node n2: clock off by -7 s (--max-clock-skew 2)",
        ),
        (
            Measurement(node="n2", wrong=("messages from n1", "all-reduce of all ranks")),
            "node n2: messages from n1: wrong data",
        ),
        (
            Measurement(node="n2", world_bandwidth=0.5),
            "all-reduce of all ranks at 0.50 GB/s, needs 1 (--min-bandwidth)",
        ),
    ],
)
def test_measurements_are_held_to_limits(measurement: Measurement, fault: str | None) -> None:
    limits = dataclasses.replace(LIMITS, bandwidth=1.0)
    found = judge_measurements([Measurement(node="n1", world_bandwidth=3.0), measurement], limits)
    assert found == ([] if fault is None else [fault])


def test_of_failures_the_earliest_stage_is_named() -> None:
    """The pair that hangs keeps its nodes from every later stage, where others wait for them."""
    pair = "messages between n2 and n3: no end within 300 s"
    later = "all-reduce of all ranks: no end within 300 s"
    measurements = [
        Measurement(node="n1", error=later, failed_stage=5),
        Measurement(node="n2", error=pair, failed_stage=3),
        Measurement(node="n3", error=pair, failed_stage=3),
    ]
    assert judge_measurements(measurements, LIMITS) == [f"nodes n2, n3: {pair}"]


def test_slow_gpu_is_named() -> None:
    speeds = [700.0, 690.0, 310.0, 705.0]
    measurements = [
        Measurement(node=f"n{rank // 2 + 1}", gemm_tflops=speed)
        for rank, speed in enumerate(speeds)
    ]
    assert judge_measurements(measurements, LIMITS) == [
        "node n2: rank 2 computes at 310 TFLOP/s, the fastest at 705 (--min-share 0.7)"
    ]


def test_node_with_a_slow_link_between_its_gpus_is_named() -> None:
    bandwidths = {"n1": 410.0, "n2": 400.0, "n3": 40.0}
    measurements = [
        Measurement(node=name, node_bandwidth=bandwidth)
        for name, bandwidth in bandwidths.items()
        for _ in range(2)
    ]
    assert judge_measurements(measurements, LIMITS) == [
        "node n3: all-reduce within the node at 40.00 GB/s, the fastest node at 410.00 "
        "(--min-share 0.7)"
    ]


NAMES = ("n1", "n2", "n3", "n4")
FAST = {(a, b): 380.0 for a in NAMES for b in NAMES if a < b}


@pytest.mark.parametrize(
    ("slow", "named"),
    [
        ({}, []),
        ({("n1", "n3"): 50.0}, ["between node n1 and node n3: 50.00 GB/s"]),
        (
            {("n1", "n3"): 50.0, ("n2", "n3"): 48.0, ("n3", "n4"): 51.0},
            ["node n3: 3 of 3 connections to other nodes at 51.00 GB/s or less"],
        ),
        (
            {("n1", "n2"): 50.0, ("n3", "n4"): 51.0},
            ["between node n1 and node n2: 50.00 GB/s", "between node n3 and node n4: 51.00 GB/s"],
        ),
    ],
)
def test_slow_pair_or_node_is_named(slow: dict[tuple[str, str], float], named: list[str]) -> None:
    faults = find_slow_pairs(FAST | slow, share=0.7)
    assert [fault.split(", the fastest pair at 380.00")[0] for fault in faults] == named


def test_of_two_nodes_both_are_named() -> None:
    """With one pair nobody can say whose end is slow, and no share of the fastest exists."""
    measurements = [
        Measurement(node=mine, received={other: 2.0}, world_bandwidth=3.0)
        for mine, other in (("n1", "n2"), ("n2", "n1"))
    ]
    assert judge_measurements(measurements, LIMITS) == []
    limits = dataclasses.replace(LIMITS, bandwidth=100.0)
    assert judge_measurements(measurements, limits) == [
        "all-reduce of all ranks at 3.00 GB/s, needs 100 (--min-bandwidth); slowest between "
        "nodes: n1 and n2 2.00"
    ]


def test_bandwidth_of_a_pair_is_of_all_ranks_in_the_slower_direction() -> None:
    measurements = [
        *(Measurement(node="n1", received={"n2": each}) for each in (40.0, 50.0)),
        *(Measurement(node="n2", received={"n1": each}) for each in (45.0, 20.0)),
    ]
    assert pair_bandwidths(measurements) == {("n1", "n2"): 65.0}


@pytest.mark.parametrize("num_nodes", range(12))
def test_every_two_nodes_meet_once(num_nodes: int) -> None:
    rounds = pair_up(num_nodes)
    pairs = [pair for each in rounds for pair in each]
    assert len(rounds) <= MAX_ROUNDS
    assert len(set(pairs)) == len(pairs)
    assert all(
        max(Counter(node for pair in each for node in pair).values()) == 1 for each in rounds
    )
    if num_nodes <= MAX_ROUNDS:
        assert len(pairs) == num_nodes * (num_nodes - 1) // 2


def test_partners_agree_and_have_the_same_place_on_their_nodes() -> None:
    places = Places(tuple(f"n{rank // 4}" for rank in range(20)))
    partners = [places.partners_of(rank) for rank in range(20)]
    for rank, of_rank in enumerate(partners):
        for turn, partner in enumerate(of_rank):
            if partner is not None:
                assert partners[partner][turn] == rank
                assert partner % 4 == rank % 4
    assert [rank for rank in range(20) if places.is_first(rank)] == [0, 4, 8, 12, 16]


def test_ranks_that_do_not_answer_are_named_with_their_nodes() -> None:
    store = HashStore()
    for rank in (1, 3):
        store.set(f"preflight/numbers/{rank}", str(rank))
    world = World(store=store, rank=0, size=5, timeout=timedelta(seconds=0.1))
    with pytest.raises(
        UserError, match=r"no answer \(numbers\) from ranks 2 \(n2\), 4 \(n3\) of 5"
    ):
        world.gather("numbers", 0, ["n1", "n1", "n2", "n2", "n3"])


def test_measurement_that_hangs_ends_with_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = threading.Event()

    def wait(_: Rank) -> float:
        hang.wait()
        raise RuntimeError("the test has ended")

    monkeypatch.setattr(Rank, "_measure_gemm", wait)
    world = World(store=HashStore(), rank=0, size=1, timeout=timedelta(seconds=2))
    measured = measure_together(world, Places(("n1",)), tmp_path, 4096)
    stages = {-1: "start", 0: "matrix product"}  # a busy machine may not get further
    assert measured.error == f"{stages[measured.failed_stage]}: no end within 2 s"
    hang.set()


class CountingStore:
    """A real store in one process that counts the requests of all ranks."""

    def __init__(self) -> None:
        self.store, self.requests = HashStore(), 0

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: object) -> object:
            self.requests += 1
            return getattr(self.store, name)(*arguments)

        return call


def count_requests(num_ranks: int) -> int:
    store = CountingStore()
    answers: list[list[int]] = []

    def meet(rank: int) -> None:
        world = World(
            store=store,  # type: ignore[arg-type]
            rank=rank,
            size=num_ranks,
            timeout=timedelta(seconds=600),
        )
        gathered = world.gather("numbers", rank)
        answers.append(world.share("sum", sum(gathered)))

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [sum(range(num_ranks))] * num_ranks
    return store.requests


def test_requests_to_the_store_grow_with_the_ranks_not_with_their_square() -> None:
    assert count_requests(64) <= 3 * 64 + 3
