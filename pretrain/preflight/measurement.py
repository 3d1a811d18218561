"""What a rank measures together with the others: clocks, the shared folder, the all-reduce."""

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from pretrain.preflight.meeting import World

GIGA = 1e9
ROUNDS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What a rank finds together with the others.

    Attributes:
        node: Its node.
        clock_skew_seconds: Its clock minus rank 0's.
        sees_first: Whether it sees what rank 0 wrote into the run directory.
        is_sum_exact: Whether every all-reduce gave the exact sum.
        bandwidth: Bus bandwidth of the all-reduce in GB/s; 0 for a world of one.
        error: Why it could not measure.
    """

    node: str
    clock_skew_seconds: float = 0.0
    sees_first: bool = True
    is_sum_exact: bool = True
    bandwidth: float = 0.0
    error: str = ""


def measure_together(world: World, node: str, run: Path, num_bytes: int) -> Measurement:
    """Compare clocks and all-reduce; collective over the world."""
    # A collective that hangs raises instead of ending the process, so that its node can be named.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    has_gpus = torch.cuda.is_available()
    probe = run / ".preflight"
    try:
        if has_gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(
            "nccl" if has_gpus else "gloo",
            store=PrefixStore("world", world.store),
            rank=world.rank,
            world_size=world.size,
            timeout=world.timeout,
        )
        try:
            if world.rank == 0:
                probe.touch()
            skew = measure_clock_skew("cuda" if has_gpus else "cpu")
            sees_first = probe.exists()
            is_sum_exact, bandwidth = measure_all_reduce("cuda" if has_gpus else "cpu", num_bytes)
        finally:
            dist.destroy_process_group()
            if world.rank == 0:
                probe.unlink(missing_ok=True)
    except (RuntimeError, OSError) as error:
        return Measurement(node=node, error=" ".join(str(error).split())[:200])
    return Measurement(
        node=node,
        clock_skew_seconds=skew,
        sees_first=sees_first,
        is_sum_exact=is_sum_exact,
        bandwidth=bandwidth,
    )


def measure_clock_skew(device: str) -> float:
    """This clock minus rank 0's in seconds, read as barriers open; the median of some readings."""
    skews = []
    for _ in range(ROUNDS):
        dist.barrier()
        mine = time.time()
        first = torch.tensor(mine, dtype=torch.float64, device=device)
        dist.broadcast(first, 0)
        skews.append(mine - float(first))
    return statistics.median(skews)


def measure_all_reduce(device: str, num_bytes: int) -> tuple[bool, float]:
    """Whether sums over all ranks are exact, and the bus bandwidth in GB/s; 0 for a world of one.

    The summands are small integers, whose sum float32 holds. The bus bandwidth counts what each
    rank must send, 2 (n - 1) / n of the bytes, so that it compares with the links' speed.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    pattern = torch.arange(num_bytes // 4, device=device).remainder(8).float()
    is_exact, seconds = True, 0.0
    expected = pattern * sum(other % 16 + 1 for other in range(size))
    for _ in range(1 + ROUNDS):  # the first sets the connections up
        tensor = pattern * (rank % 16 + 1)
        dist.barrier()
        began = time.monotonic()
        dist.all_reduce(tensor)
        is_right = torch.equal(tensor, expected)  # also waits for the device
        lasted = time.monotonic() - began
        is_exact &= is_right
        seconds = min(seconds or lasted, lasted)
    return is_exact, 2 * (size - 1) / size * num_bytes / seconds / GIGA
