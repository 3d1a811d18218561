"""What this rank's device holds, and the speed that it reaches."""

import resource
import statistics
from dataclasses import dataclass
from typing import Any

import torch

PRODUCT_SIZE = 8192
NUM_PRODUCTS = 20
NUM_WARMUP_PRODUCTS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """Peaks of this process in bytes.

    Attributes:
        peak: Allocated by tensors on the GPU; without one, resident in the memory of the machine
            since the process began.
        reserved: Taken from the GPU by torch's allocator; None without a GPU.
    """

    peak: int
    reserved: int | None


def count_memory() -> StepMemory:
    """Return the peaks since they were last reset."""
    if torch.cuda.is_available():
        return StepMemory(
            peak=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved()
        )
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return StepMemory(peak=kibibytes * 1024, reserved=None)


def measure_peak() -> float | None:
    """Return the bf16 FLOP/s that a large matrix product reaches on this GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    shape = (PRODUCT_SIZE, PRODUCT_SIZE)
    left, right = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    event: Any = torch.cuda.Event
    marks = [event(enable_timing=True) for _ in range(NUM_PRODUCTS + 1)]
    for _ in range(NUM_WARMUP_PRODUCTS):
        left @ right
    marks[0].record()
    for mark in marks[1:]:
        left @ right
        mark.record()
    torch.cuda.synchronize()
    milliseconds: list[float] = [
        before.elapsed_time(after) for before, after in zip(marks, marks[1:], strict=False)
    ]
    del left, right
    torch.cuda.empty_cache()
    flops = 2.0 * PRODUCT_SIZE * PRODUCT_SIZE * PRODUCT_SIZE
    return flops / (statistics.median(milliseconds) / 1e3)
