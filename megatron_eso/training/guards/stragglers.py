"""Finds the slow rank by each rank's own time of forward and backward.

The time ends before Megatron-Core reduces gradients, where every rank waits for the slowest. In a
pipeline it includes the wait for the neighbouring stages; there the numbers compare the pipelines.
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
        spread: This time divided by the median of all ranks.
    """

    rank: int
    host: str
    seconds: float
    spread: float

    @property
    def is_notable(self) -> bool:
        """Whether the log names it."""
        excess = self.seconds * (1 - 1 / self.spread)
        return self.spread >= NOTABLE_SPREAD and excess >= NOTABLE_SECONDS


class WorkTimer:
    """The timer of forward and backward of this rank's steps, by the clock of its GPU if any.

    Args:
        chunks: This rank's parts of the model.
    """

    def __init__(self, chunks: list[DistributedDataParallel]) -> None:
        self._finalize = chunks[0].config.finalize_model_grads_func
        chunks[0].config.finalize_model_grads_func = self._end_work
        self._marks: list[tuple[Any, Any]] = []
        self._began: Any = None

    def begin(self) -> None:
        """Start the time of a step."""
        self._began = _mark()

    def take_mean(self) -> float:
        """Return the mean seconds of the steps since the last call; these steps have ended."""
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
        hosts: The host of every rank.
    """
    own = torch.tensor([seconds], dtype=torch.float64, device=torch.cuda.current_device())
    every = own.new_empty(len(hosts))
    dist.all_gather_into_tensor(every, own)
    return pick_straggler(every.tolist(), hosts)


def pick_straggler(seconds: Sequence[float], hosts: Sequence[str]) -> Straggler:
    """Return the slowest rank, given times and hosts by rank."""
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    median = statistics.median(seconds)
    return Straggler(
        rank=rank,
        host=hosts[rank],
        seconds=seconds[rank],
        spread=seconds[rank] / median if median > 0 else 1.0,
    )


def _mark() -> Any:
    """Return an instant of the GPU's stream, or of the clock without a GPU."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _seconds_between(began: Any, ended: Any) -> float:
    if isinstance(began, float):
        return float(ended - began)
    return float(began.elapsed_time(ended)) / 1000
