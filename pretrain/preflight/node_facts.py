"""What is found on a node without the others: GPUs, versions, disk."""

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_eso.quantities import GIB, MIB
from megatron_eso.ranks import choose_gpu, local_rank
from pretrain.preflight.meeting import find_node

PACKAGES = ("torch", "megatron-core")
OURS = ("megatron_eso", "pretrain")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFacts:
    """What a rank finds by itself.

    Attributes:
        node: Its node.
        gpu: The UUID of the GPU that it takes; empty without one.
        visible_gpus: The UUIDs of all GPUs that it sees.
    """

    node: str
    gpu: str
    visible_gpus: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFacts:
    """What the first rank of a node finds there.

    Attributes:
        node: The node.
        num_devices: GPUs that the job should see, by Slurm or else by their device files.
        gpu: The model of the first GPU.
        versions: By package.
        free_gib: Free space where the run directory is.
        disk_error: Why the run directory cannot be written.
    """

    node: str
    num_devices: int
    gpu: str
    versions: dict[str, str]
    free_gib: float
    disk_error: str


def find_rank_facts() -> RankFacts:
    """Look at the GPUs that this rank sees."""
    visible = tuple(
        str(torch.cuda.get_device_properties(index).uuid)
        for index in range(torch.cuda.device_count())
    )
    own = choose_gpu(local_rank(), len(visible))
    return RankFacts(
        node=find_node(), gpu="" if own is None else visible[own], visible_gpus=visible
    )


def find_node_facts(run: Path) -> NodeFacts:
    """Look at this node; writes a file into the run directory and removes it."""
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
    return NodeFacts(
        node=find_node(),
        num_devices=count_devices(Path("/dev")),
        gpu=torch.cuda.get_device_name(0) if torch.cuda.device_count() else "",
        versions={"python": platform.python_version()}
        | {name: find_version(name) for name in PACKAGES}
        | {"megatron-eso": f"{find_version('megatron-eso')} ({hash_sources()})"},
        free_gib=free,
        disk_error=disk_error,
    )


def count_devices(folder: Path) -> int:
    """Count the GPUs that Slurm gave the job on this node, else the device files in `folder`."""
    of_job = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if of_job.isdigit():
        return int(of_job)
    return sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in folder.iterdir())


def find_version(package: str) -> str:
    """Return the version that is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def hash_sources() -> str:
    """Hash our Python files: two checkouts may differ under one version."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[2]
    for path in sorted(path for name in OURS for path in (root / name).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]
