"""What a rank finds on its node by itself: GPUs, versions, disk."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_eso.quantities import GIB, MIB
from pretrain.preflight.meeting import find_node

PACKAGES = ("torch", "megatron-core")
OURS = ("megatron_eso", "pretrain")


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
    """Hash our Python files: two checkouts may differ under one version."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[2]
    for path in sorted(path for name in OURS for path in (root / name).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]
