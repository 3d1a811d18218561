"""Chooses the device of the ranks, and sets what CUDA and NCCL read when they start."""

import json
import os
import socket
from pathlib import Path

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from megatron_eso.config.sections import Config
from megatron_eso.errors import ConfigError

GPU_FILE = Path("/dev/nvidia0")
GPU_COUNT_VARIABLE = "SLURM_GPUS_ON_NODE"
MAX_NAMED_HOSTS = 8
EARLIER_FLIGHT_RECORDER_SIZE = "TORCH_NCCL_TRACE_BUFFER_SIZE"
FLIGHT_RECORDER_SIZE = (
    "TORCH_FR_BUFFER_SIZE" if torch.__version__ >= "2.8" else EARLIER_FLIGHT_RECORDER_SIZE
)
"""Variable with the number of collectives that torch records; torch 2.8 renamed it."""


def prepare_device(config: Config) -> None:
    """Choose the device of this rank and its settings; call it before anything uses CUDA.

    Variables that the user has set keep their values.

    Raises:
        ConfigError: This host should have GPUs, and torch cannot use them.
    """
    if config.train.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        refuse_missing_gpus()
    set_defaults(config)


def refuse_missing_gpus() -> None:
    """Refuse to train on the CPU of a host that should have GPUs.

    Raises:
        ConfigError: The host has a GPU file or Slurm has allocated GPUs.
    """
    num_gpus = os.environ.get(GPU_COUNT_VARIABLE, "")
    if num_gpus not in ("", "0"):
        sign = f"{GPU_COUNT_VARIABLE} = {num_gpus}"
    elif GPU_FILE.exists():
        sign = f"{GPU_FILE} exists"
    else:
        return
    raise ConfigError(
        f"{socket.gethostname()}: {sign}, but torch {torch.__version__} has no working CUDA: check "
        "nvidia-smi, install a CUDA build of torch, start a container with its GPU option, or set "
        'train.device = "cpu" to train on the CPU'
    )


def set_defaults(config: Config) -> None:
    """Set the environment variables that CUDA, NCCL and gloo read when they start."""
    defaults = {
        # Micro-batches differ in size, which fragments memory in segments of a fixed size.
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        # The collectives that a report of the watchdog includes.
        FLIGHT_RECORDER_SIZE: "2000",
        # Without it, every rank opens a socket to every other rank.
        "TORCH_GLOO_LAZY_INIT": "1",
    }
    if "PYTORCH_CUDA_ALLOC_CONF" in os.environ:  # the earlier name, which the user has set
        del defaults["PYTORCH_ALLOC_CONF"]
    if EARLIER_FLIGHT_RECORDER_SIZE in os.environ:  # its earlier name, which the user has set
        del defaults[FLIGHT_RECORDER_SIZE]
    if config.parallel.tensor_model_parallel_size > 1:
        # Megatron-Core's tensor parallelism relies on the order in which kernels are queued.
        defaults["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if config.train.deterministic:
        defaults |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}
        torch.use_deterministic_algorithms(True)
        # No kernel reads memory that was never written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def compare_devices(store: Store, rank: int, num_ranks: int, *, has_gpu: bool) -> None:
    """Refuse a world in which some ranks have a GPU and others do not; collective over the world.

    Args:
        store: The store of the ranks, before they have a process group.
        rank: This rank.
        num_ranks: Ranks of the world.
        has_gpu: Whether this rank has one.

    Raises:
        ConfigError: Devices differ; every rank raises the same error, which names the hosts.
    """
    store.set(f"device/{rank}", json.dumps([has_gpu, socket.gethostname()]))
    # The last rank to arrive compares, so that every rank makes a few requests only.
    if store.add("device/arrived", 1) == num_ranks:
        answers = store.multi_get([f"device/{each}" for each in range(num_ranks)])
        store.set("device/fault", describe_difference([json.loads(each) for each in answers]))
    fault = store.get("device/fault").decode()
    if fault:
        raise ConfigError(fault)


def describe_difference(devices: list[tuple[bool, str]]) -> str:
    """Describe which hosts have no GPU while others have; empty if all are alike.

    Args:
        devices: Whether a rank has a GPU, and its host, for every rank.
    """
    without = list(dict.fromkeys(host for has_gpu, host in devices if not has_gpu))
    if not without or not any(has_gpu for has_gpu, _ in devices):
        return ""
    more = f" and {len(without) - MAX_NAMED_HOSTS} more" if without[MAX_NAMED_HOSTS:] else ""
    return (
        f"no working CUDA on {', '.join(without[:MAX_NAMED_HOSTS])}{more}, while other hosts have "
        "GPUs: check nvidia-smi there, or leave the hosts out (sbatch --exclude)"
    )
