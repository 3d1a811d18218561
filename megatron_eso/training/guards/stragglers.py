"""Which rank is slow: each rank's own time of forward and backward, before any waits for another.

The time ends where Megatron-Core is about to reduce gradients: from there on all ranks are as slow
as the slowest. Within a pipeline it includes the wait for the neighbouring stages, so that there
the ranks of different pipelines are what the numbers compare.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

NOTABLE_SPREAD = 1.2
NOTABLE_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Straggler:
    """The slowest rank of the world.

    Attributes:
        rank: Its number.
        host: Where it runs.
        seconds: Its mean time of forward and backward.
        spread: This over the median of all ranks.
    """

    rank: int
    host: str
    seconds: float
    spread: float

    @property
    def is_notable(self) -> bool:
        """Whether the log should name it."""
        excess = self.seconds * (1 - 1 / self.spread)
        return self.spread >= NOTABLE_SPREAD and excess >= NOTABLE_SECONDS


class WorkTimer:
    """Times forward and backward of this rank's steps, with the GPU's clock where there is one.

    Args:
        chunks: This rank's parts of the model, whose schedule is to be timed.
    """

    def __init__(self, chunks: list[DistributedDataParallel]) -> None:
        self._finalize = chunks[0].config.finalize_model_grads_func
        chunks[0].config.finalize_model_grads_func = self._end_work
        self._marks: list[tuple[Any, Any]] = []
        self._began: Any = None

    def begin(self) -> None:
        """Say that a step begins."""
        self._began = _mark()

    def take_mean(self) -> float:
        """Mean seconds of the steps since the last call; they must have been waited for."""
        seconds = [_seconds_between(*marks) for marks in self._marks]
        self._marks.clear()
        return statistics.fmean(seconds) if seconds else 0.0

    def _end_work(self, *args: Any, **kwargs: Any) -> None:
        if self._began is not None:
            self._marks.append((self._began, _mark()))
            self._began = None
        self._finalize(*args, **kwargs)


def find_straggler(seconds: float, hosts: Sequence[str]) -> Straggler:
    """Compare the ranks; collective over the world.

    Args:
        seconds: Mean time of this rank.
        hosts: Of every rank.
    """
    own = torch.tensor([seconds], dtype=torch.float64, device=torch.cuda.current_device())
    every = [torch.empty_like(own) for _ in hosts]
    dist.all_gather(every, own)
    return pick_straggler([float(value) for value in every], hosts)


def pick_straggler(seconds: Sequence[float], hosts: Sequence[str]) -> Straggler:
    """The slowest of the ranks, whose times and hosts are given by rank."""
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    median = statistics.median(seconds)
    return Straggler(
        rank=rank,
        host=hosts[rank],
        seconds=seconds[rank],
        spread=seconds[rank] / median if median > 0 else 1.0,
    )


def _mark() -> Any:
    """An instant of the GPU's stream, or of the clock without one."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _seconds_between(began: Any, ended: Any) -> float:
    if isinstance(began, float):
        return float(ended - began)
    return float(began.elapsed_time(ended)) / 1000
