"""The published speed and the used memory of this rank's device."""

import resource

import torch

from megatron_eso.quantities import GIB

# Dense bf16 peaks that the vendors publish, in FLOP/s, by a part of the device's name. A name that
# contains another one comes first.
PUBLISHED_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,  # GH200 as well
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
}


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


def find_peak(name: str) -> float | None:
    """Return the published dense bf16 FLOP/s of a GPU by its name; None if unknown."""
    return next((peak for part, peak in PUBLISHED_PEAKS.items() if part in name), None)
