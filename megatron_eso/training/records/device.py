"""The published speed and the used memory of this rank's device."""

import resource

import torch

from megatron_eso.estimates.gpus import find_peak
from megatron_eso.quantities import GIB


def used_memory_gib() -> float:
    """Return this process's peak memory in GiB: of its GPU, or of the host without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def reserved_memory_gib() -> float | None:
    """Return the GPU memory that torch's allocator held at most, in GiB; None without a GPU."""
    return torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else None


def published_peak() -> float | None:
    """Return the published dense bf16 FLOP/s of this rank's GPU; None if unknown."""
    return find_peak(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
