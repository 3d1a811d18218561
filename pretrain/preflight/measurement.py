"""What a rank measures: its GPU, then together with its node, with other nodes and with all ranks.

The stages go from few ranks to all, so that the first one that fails names the nodes at fault. On
GPUs the GPU's own clock times many repeats at once.
"""

import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup  # type: ignore[attr-defined]

from megatron_eso.ranks import choose_gpu, local_rank
from pretrain.preflight.meeting import World
from pretrain.preflight.places import Places

GIGA, TERA = 1e9, 1e12
CLOCK_READINGS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What a rank measures. Bandwidths are in GB/s, 0 where there is nothing to measure.

    Attributes:
        node: Its node.
        clock_skew_seconds: Its clock minus rank 0's.
        sees_first: Whether it sees what rank 0 wrote into the run directory.
        gemm_tflops: TFLOP/s of a matrix product on its device.
        node_bandwidth: Bus bandwidth of an all-reduce of its node.
        received: What arrived from its partner on another node, by that node.
        world_bandwidth: Bus bandwidth of an all-reduce of all ranks.
        wrong: The stages whose data arrived with a wrong value.
        error: The stage that failed, and why.
        failed_stage: Its number; -1: none.
    """

    node: str
    clock_skew_seconds: float = 0.0
    sees_first: bool = True
    gemm_tflops: float = 0.0
    node_bandwidth: float = 0.0
    received: dict[str, float] = field(default_factory=dict)
    world_bandwidth: float = 0.0
    wrong: tuple[str, ...] = ()
    error: str = ""
    failed_stage: int = -1


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured on a kind of device."""

    num_bytes: int
    repeats: int
    gemm_size: int
    gemm_repeats: int
    gemm_dtype: torch.dtype


class Stages:
    """The stage that a rank is at, to be read by another thread."""

    def __init__(self) -> None:
        self.text, self.number = "start", -1

    def enter(self, text: str) -> None:
        """Begin the next stage."""
        self.text, self.number = text, self.number + 1


def choose_effort(has_gpus: bool, num_bytes: int | None) -> Effort:
    """Return how much to measure; `num_bytes` replaces the usual size of a message."""
    if has_gpus:
        return Effort(num_bytes or 2**28, 20, 8192, 200, torch.bfloat16)
    return Effort(num_bytes or 2**22, 3, 256, 3, torch.float32)


def measure_together(world: World, places: Places, run: Path, num_bytes: int | None) -> Measurement:
    """Measure; collective over the world.

    The work runs in a thread: a connection that hangs cannot be interrupted. After an error or a
    hang, the process has to end by `os._exit`, since process groups may wait for others.
    """
    node, seconds = places.nodes_by_rank[world.rank], world.timeout.total_seconds()
    stages = Stages()
    results: list[Measurement] = []

    def work() -> None:
        try:
            effort = choose_effort(torch.cuda.is_available(), num_bytes)
            rank = Rank(world, places, stages, take_device(), effort)
            results.append(rank.measure(run))
        except (RuntimeError, OSError) as error:
            results.append(describe_failure(node, stages, str(error)))

    thread = threading.Thread(target=work, name="measurement", daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else describe_failure(node, stages, f"no end within {seconds:g} s")


def take_device() -> torch.device:
    """Make the GPU of this rank the current one of this thread; the CPU without a GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # A rank without a GPU of its own does not come here.
    device = torch.device("cuda", choose_gpu(local_rank(), torch.cuda.device_count()) or 0)
    torch.cuda.set_device(device)
    return device


def describe_failure(node: str, stages: Stages, why: str) -> Measurement:
    """Return a measurement that failed at the stage reached."""
    text = f"{stages.text}: {' '.join(why.split())[:200]}"
    return Measurement(node=node, error=text, failed_stage=stages.number)


class Rank:
    """One rank at its measurements.

    Args:
        world: The ranks and their store.
        places: The node of every rank.
        stages: Are entered one after the other.
        device: The device of this rank.
        effort: How much to measure.
    """

    def __init__(
        self, world: World, places: Places, stages: Stages, device: torch.device, effort: Effort
    ) -> None:
        self._world, self._places, self._stages = world, places, stages
        self._device, self._effort = device, effort
        self._node = places.nodes_by_rank[world.rank]
        self._wrong: list[str] = []
        elements = torch.arange(effort.num_bytes // 4, device=device)
        # Small integers, whose sums float32 holds.
        self._pattern = elements.remainder(8).float()

    def measure(self, run: Path) -> Measurement:
        """Go through the stages, from this rank alone to all ranks."""
        self._stages.enter("matrix product")
        gemm_tflops = self._measure_gemm()
        self._open_process_group()
        # From few ranks to all
        self._stages.enter("all-reduce within the node")
        own_node = self._places.ranks_of(self._node)
        group = dist.new_group(own_node, use_local_synchronization=True)
        node_bandwidth = self._measure_all_reduce(own_node, group, "within the node")
        received = self._measure_pairs()
        self._stages.enter("all-reduce of all ranks")
        everyone = list(range(self._world.size))
        world_bandwidth = self._measure_all_reduce(everyone, None, "of all ranks")
        skew = self._measure_clock_skew()
        self._stages.enter("end of the process group")
        dist.destroy_process_group()
        return Measurement(
            node=self._node,
            clock_skew_seconds=skew,
            sees_first=probe_of(run).exists(),
            gemm_tflops=gemm_tflops,
            node_bandwidth=node_bandwidth,
            received=received,
            world_bandwidth=world_bandwidth,
            wrong=tuple(self._wrong),
        )

    def _open_process_group(self) -> None:
        """Join the world; collective over it."""
        self._stages.enter("process group")
        is_gpu = self._device.type == "cuda"
        # With it, ranks would poll a millisecond or more apart, and that would be measured.
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "0"
        dist.init_process_group(
            "nccl" if is_gpu else "gloo",
            store=PrefixStore("world", self._world.store),
            rank=self._world.rank,
            world_size=self._world.size,
            # NCCL ends the process at its time-out, so the deadline of `measure_together` is first.
            timeout=self._world.timeout * (2 if is_gpu else 1),
        )

    def _measure_gemm(self) -> float:
        """Return the TFLOP/s of a square matrix product."""
        size, dtype = self._effort.gemm_size, self._effort.gemm_dtype
        left, right = (torch.randn(size, size, device=self._device, dtype=dtype) for _ in range(2))
        seconds = self._time(lambda: torch.mm(left, right), self._effort.gemm_repeats)
        return 2 * size**3 / seconds / TERA

    def _measure_all_reduce(self, ranks: list[int], group: ProcessGroup | None, name: str) -> float:
        """Return the bus bandwidth of `ranks`; collective over them.

        It counts what each rank must send, 2 (n - 1) / n of the bytes, and so compares with the
        speed of the links.
        """
        if len(ranks) == 1:
            return 0.0
        summed = self._pattern * summand(self._world.rank)
        dist.all_reduce(summed, group=group)
        if not torch.equal(summed, self._pattern * sum(map(summand, ranks))):
            self._wrong.append(f"all-reduce {name}")
        zeros = torch.zeros_like(self._pattern)
        seconds = self._time(lambda: dist.all_reduce(zeros, group=group), self._effort.repeats)
        return 2 * (len(ranks) - 1) / len(ranks) * self._effort.num_bytes / seconds / GIGA

    def _measure_pairs(self) -> dict[str, float]:
        """Exchange with one rank of another node after the other; GB/s received, by node.

        All pairs of a round work at the same time, and all ranks of their nodes.
        """
        received = {}
        for partner in self._places.partners_of(self._world.rank):
            if partner is None:
                self._stages.enter("pause")
                continue
            other = self._places.nodes_by_rank[partner]
            first, second = sorted((self._node, other))
            self._stages.enter(f"messages between {first} and {second}")
            received[other] = self._exchange(partner, other)
        return received

    def _exchange(self, partner: int, other: str) -> float:
        """Send to a rank of another node and receive from it; GB/s received."""
        outgoing = self._pattern * summand(self._world.rank)
        incoming = torch.empty_like(outgoing)
        seconds = 0.0
        # One direction after the other: NCCL keeps the order of a pair's messages.
        for sender in sorted((self._world.rank, partner)):
            if sender == partner:
                seconds = self._time(lambda: dist.recv(incoming, partner), self._effort.repeats)
            else:
                self._time(lambda: dist.send(outgoing, partner), self._effort.repeats)
        if not torch.equal(incoming, self._pattern * summand(partner)):
            self._wrong.append(f"messages from {other}")
        return self._effort.num_bytes / seconds / GIGA

    def _measure_clock_skew(self) -> float:
        """Return this clock minus rank 0's in seconds, read as all ranks meet; a median."""
        self._stages.enter("clocks")
        skews = []
        for _ in range(CLOCK_READINGS):
            meeting = torch.zeros(1, device=self._device)
            dist.all_reduce(meeting)
            meeting.item()  # waits for the device
            mine = time.time()
            first = torch.tensor(mine, dtype=torch.float64, device=self._device)
            dist.broadcast(first, 0)
            skews.append(mine - float(first))
        return statistics.median(skews)

    def _time(self, work: Callable[[], object], repeats: int) -> float:
        """Return the seconds of one `work`, after one that is not counted."""
        work()
        if self._device.type == "cuda":
            begin, end = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )
            begin.record()
            for _ in range(repeats):
                work()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3 / repeats
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - began) / repeats


def summand(rank: int) -> int:
    """Return what a rank multiplies the pattern by."""
    return rank % 16 + 1


def probe_of(run: Path) -> Path:
    """Return the file that rank 0 writes for the others to see."""
    return run / ".preflight"
