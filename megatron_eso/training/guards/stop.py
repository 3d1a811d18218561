"""Requests to stop a run early: a signal, a file, the end of the allocation.

Whoever asks, and whichever rank hears it: the loop compares notes over all ranks after every step,
and all save and leave after the same one. The handlers only take a note, so a second signal finds a
save that goes on undisturbed.
"""

import logging
import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

import torch.distributed as dist

from megatron_eso.runs.run_directory import RunDirectory

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
END_TIME_VARIABLE = "SLURM_JOB_END_TIME"

# By number; of several the highest is told.
REASONS = {
    1: "the file requeue is in the run directory",
    2: "the file stop is in the run directory",
    3: "the allocation ends",
    4: "SIGTERM",
    5: "SIGUSR1",
}
_REQUEUE, _STOP, _END, *_OF_SIGNALS = REASONS
_SECONDS_BETWEEN_LOOKS = 1.0

logger = logging.getLogger(__name__)


class StopRequests:
    """Listens from `__enter__` to `__exit__`; make it on the main thread of every rank.

    Once one was heard, signals go on meaning nothing after that.

    Args:
        run: The run directory. A file that asked the job before is removed on rank 0.
        end_margin_seconds: How long before the end of a Slurm allocation to stop; 0: never.
    """

    def __init__(self, run: RunDirectory, end_margin_seconds: float) -> None:
        self._files = {_STOP: run.stop_file, _REQUEUE: run.requeue_file}
        self._margin = end_margin_seconds
        self._end = _allocation_end(end_margin_seconds)
        self._heard = 0
        self._next_look = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if os.environ.get("RANK", "0") == "0":
            for file in self._files.values():
                file.unlink(missing_ok=True)
            left = self._end - time.time()
            if left < self._margin:
                logger.warning(
                    "%.0f minutes are left until checkpoint.end_margin_minutes = %g before the end "
                    "of the allocation: ask for a longer one, or lower it",
                    max(left, 0) / 60,
                    self._margin / 60,
                )
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._take_note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Told once more, a process that is leaving anyway must not fail at it.
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self._heard else handler)

    def heard(self) -> int:
        """What this rank has heard: 0, or the number of a reason, to be compared over all ranks."""
        return max(self._heard, self._look())

    def _take_note(self, number: int, _frame: FrameType | None) -> None:
        self._heard = _OF_SIGNALS[SIGNALS.index(signal.Signals(number))]

    def _look(self) -> int:
        """Files and clock, on rank 0: a file system is not asked by every rank at every step."""
        now = time.time()
        if dist.get_rank() != 0 or now < self._next_look:
            return 0
        self._next_look = now + _SECONDS_BETWEEN_LOOKS
        if now >= self._end:
            return _END
        return next((reason for reason, file in self._files.items() if file.exists()), 0)


def _allocation_end(margin_seconds: float) -> float:
    """When to stop, in seconds since the epoch: the margin before the end that Slurm tells."""
    told = os.environ.get(END_TIME_VARIABLE, "")
    return float(told) - margin_seconds if margin_seconds > 0 and told.isdigit() else float("inf")
