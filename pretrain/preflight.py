"""Checks every node before a run, under torchrun or srun: GPUs, versions, disk, clock, all-reduce.

Prints a line per node. Exit code 0 if all is well, else 1 with one line that names node and fault.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
)

from megatron_eso.errors import UserError, run_command

MIB, GIB, GIGA = 2**20, 2**30, 1e9
ROUNDS = 5
PACKAGES = ("torch", "megatron-core")
OURS = ("megatron_eso", "pretrain")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What is too little or too much.

    Attributes:
        clock_skew_seconds: Between a node's clock and the first one's.
        free_gib: Free space where the run directory is.
        bandwidth: Bus bandwidth of the all-reduce over all ranks in GB/s; 0: any.
    """

    clock_skew_seconds: float
    free_gib: float
    bandwidth: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a rank finds on its node by itself."""

    node: str
    num_ranks: int  # on this node
    num_gpus: int
    gpu: str
    versions: dict[str, str]
    free_gib: float
    disk_error: str


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


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The ranks, and the launcher's key-value store: it works where process groups may not."""

    store: Store
    rank: int
    size: int
    timeout: timedelta

    def exchange(self, name: str, mine: Any) -> list[Any]:
        """What each rank says, by rank; JSON. Collective.

        Raises:
            UserError: Some ranks say nothing in time; the message names them.
        """
        self.store.set(f"preflight/{name}/{self.rank}", json.dumps(mine))
        deadline = time.monotonic() + self.timeout.total_seconds()
        found, silent = [], []
        for rank in range(self.size):
            left = max(deadline - time.monotonic(), 0.1)
            try:
                self.store.wait([f"preflight/{name}/{rank}"], timedelta(seconds=left))
                found.append(json.loads(self.store.get(f"preflight/{name}/{rank}")))
            except RuntimeError:
                silent.append(str(rank))
        if silent:
            raise UserError(
                f"no word ({name}) from ranks {', '.join(silent)} of {self.size} within "
                f"{self.timeout.total_seconds():g} s: look at their nodes' log and network"
            )
        return found

    def leave(self) -> None:
        """Part; rank 0, which may hold the store, leaves last."""
        names = [f"preflight/left/{rank}" for rank in range(self.size)]
        self.store.set(names[self.rank], "")
        if self.rank == 0:
            with suppress(RuntimeError):  # who does not leave has said so
                self.store.wait(names, self.timeout)


def main(argv: list[str] | None = None) -> None:
    """Check; collective over the world.

    Raises:
        UserError: On rank 0: nodes and faults, in a line.
    """
    arguments = parse_arguments(argv)
    limits = Limits(
        clock_skew_seconds=arguments.max_clock_skew,
        free_gib=arguments.min_free_gib,
        bandwidth=arguments.min_bandwidth,
    )
    world = meet(timedelta(seconds=arguments.timeout))
    faults = check(world, Path(arguments.run_dir), limits, arguments.megabytes)
    # Nobody else fails: launchers end all ranks when one does, and rank 0 has a line to say.
    if faults and world.rank == 0:
        raise UserError("; ".join(faults))


def check(world: World, run: Path, limits: Limits, megabytes: int | None) -> list[str]:
    """Find out what is wrong with which node, and show the nodes on rank 0; collective."""
    mine = find_facts(run)
    facts = [Facts(**each) for each in world.exchange("facts", asdict(mine))]
    measurements: list[Measurement] = []
    faults = judge_facts(facts, limits)
    if not faults:
        size = (megabytes or (256 if mine.num_gpus else 4)) * MIB
        measured = measure(world, mine.node, run, size)
        measurements = [
            Measurement(**each) for each in world.exchange("measurements", asdict(measured))
        ]
        faults = judge_measurements(measurements, limits)
    if world.rank == 0:
        sys.stdout.writelines(f"{line}\n" for line in describe_nodes(facts, measurements))
        sys.stdout.flush()
    world.leave()
    return faults


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.preflight", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="is made if it is not there")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS")
    parser.add_argument("--max-clock-skew", type=float, default=2.0, metavar="SECONDS")
    parser.add_argument("--min-free-gib", type=float, default=1.0, metavar="GIB")
    parser.add_argument("--min-bandwidth", type=float, default=0.0, metavar="GB/S")
    parser.add_argument("--megabytes", type=int, metavar="MIB", help="size of the all-reduce")
    return parser.parse_args(argv)


def meet(timeout: timedelta) -> World:
    """Find the store that the launcher's environment names; a world of one without a launcher.

    Raises:
        UserError: It cannot be reached.
    """
    if "MASTER_ADDR" not in os.environ:
        return World(store=HashStore(), rank=0, size=1, timeout=timeout)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        # Does not wait for all: it is to say who is missing.
        store = TCPStore(
            address,
            port,
            size,
            is_master=rank == 0 and not has_agent,
            timeout=timeout,
            wait_for_workers=False,
        )
    except RuntimeError as error:
        raise UserError(f"{find_node()}: cannot reach {address}:{port}: {error}") from error
    return World(store=store, rank=rank, size=size, timeout=timeout)


def find_node() -> str:
    """The node as Slurm calls it, else the host."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def find_facts(run: Path) -> Facts:
    """Look at this node."""
    disk_error, free = "", 0.0
    try:
        run.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run).free / GIB
        probe = run / f".preflight_{find_node()}_{os.getpid()}"
        with probe.open("wb") as stream:
            stream.write(bytes(MIB))
            stream.flush()
            os.fsync(stream.fileno())
        probe.unlink()
    except OSError as error:
        disk_error = f"cannot write into {run}: {error.strerror}"
    num_gpus = torch.cuda.device_count()
    return Facts(
        node=find_node(),
        num_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_gpus=num_gpus,
        gpu=torch.cuda.get_device_name(0) if num_gpus else "",
        versions={"python": platform.python_version()}
        | {name: find_version(name) for name in PACKAGES}
        | {"megatron-eso": f"{find_version('megatron-eso')} ({hash_sources()})"},
        free_gib=free,
        disk_error=disk_error,
    )


def find_version(package: str) -> str:
    """The version that is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def hash_sources() -> str:
    """Of our Python files: two checkouts may differ under one version."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(path for name in OURS for path in (root / name).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def measure(world: World, node: str, run: Path, num_bytes: int) -> Measurement:
    """Compare clocks and all-reduce; collective over the world."""
    # A collective that hangs raises instead of ending the process, so that its node can be told.
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


def judge_facts(facts: Sequence[Facts], limits: Limits) -> list[str]:
    """What is wrong with which node; versions and GPUs are compared with what most nodes have."""
    nodes = list({each.node: each for each in facts}.values())
    faults = find_odd(nodes, "GPUs", lambda each: str(each.num_gpus))
    faults += find_odd(nodes, "the GPU", lambda each: each.gpu or "none")
    for name in nodes[0].versions:
        faults += find_odd(nodes, name, partial(read_version, name))
    for each in nodes:
        if 0 < each.num_gpus < each.num_ranks:
            faults.append(f"node {each.node}: {each.num_ranks} ranks on {each.num_gpus} GPUs")
        if not each.disk_error and each.free_gib < limits.free_gib:
            faults.append(
                f"node {each.node}: {each.free_gib:.1f} GiB free for the run directory, needs "
                f"{limits.free_gib:g} (--min-free-gib)"
            )
    errors = {each.node: each.disk_error for each in facts if each.disk_error}
    return faults + [f"node {node}: {error}" for node, error in errors.items()]


def read_version(name: str, facts: Facts) -> str:
    """Of a package, or of Python."""
    return facts.versions[name]


def find_odd(nodes: Sequence[Facts], what: str, read: Callable[[Facts], str]) -> list[str]:
    """The nodes that differ from most."""
    usual = statistics.mode(read(each) for each in nodes)
    return [
        f"node {each.node}: {what} {read(each)}, elsewhere {usual}"
        for each in nodes
        if read(each) != usual
    ]


def judge_measurements(measurements: Sequence[Measurement], limits: Limits) -> list[str]:
    """What is wrong with which node, each fault of a node once."""
    faults = []
    for each in measurements:
        if each.error:
            faults.append(f"node {each.node}: all-reduce failed: {each.error}")
        if abs(each.clock_skew_seconds) > limits.clock_skew_seconds:
            faults.append(
                f"node {each.node}: clock off by {each.clock_skew_seconds:+.0f} s "
                f"(--max-clock-skew {limits.clock_skew_seconds:g})"
            )
        if not each.sees_first:
            faults.append(f"node {each.node}: does not share the run directory with the first node")
        if not each.is_sum_exact:
            faults.append(f"node {each.node}: all-reduce gives a wrong sum")
    slowest = min(measurements, key=lambda each: each.bandwidth)
    if len(measurements) > 1 and slowest.bandwidth < limits.bandwidth and not faults:
        faults.append(
            f"node {slowest.node}: all-reduce at {slowest.bandwidth:.2f} GB/s, needs "
            f"{limits.bandwidth:g} (--min-bandwidth)"
        )
    return list(dict.fromkeys(faults))


def describe_nodes(facts: Sequence[Facts], measurements: Sequence[Measurement]) -> list[str]:
    """A line per node."""
    lines = []
    for node, fact in {each.node: each for each in facts}.items():
        parts = [
            f"{fact.num_ranks} ranks",
            f"{fact.num_gpus} x {fact.gpu}" if fact.num_gpus else "no GPU",
            ", ".join(f"{name} {version}" for name, version in fact.versions.items()),
            f"{fact.free_gib:.1f} GiB free",
        ]
        of_node = [each for each in measurements if each.node == node]
        if of_node:
            skew = max((each.clock_skew_seconds for each in of_node), key=abs)
            is_exact = all(each.is_sum_exact and not each.error for each in of_node)
            parts.append(f"clock {skew:+.3f} s")
            parts.append(
                f"all-reduce {'exact' if is_exact else 'WRONG'}, "
                f"{min(each.bandwidth for each in of_node):.2f} GB/s"
            )
        lines.append(f"node {node}: {' | '.join(parts)}")
    return lines


if __name__ == "__main__":
    run_command(main)
