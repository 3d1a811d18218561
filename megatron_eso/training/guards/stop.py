"""Requests to stop a run early: a signal, a file, the end of the allocation.

A request may reach one rank only. After every step the loop therefore takes the maximum over all
ranks, and all of them save and stop after the same step. The handlers only store the request, so a
second signal does not disturb a save; a second Ctrl-C ends this process.
"""

import logging
import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any, Self

from megatron_eso.errors import end_by_signal
from megatron_eso.ranks import is_first_rank
from megatron_eso.runs.run_directory import RunDirectory

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
END_TIME_VARIABLE = "SLURM_JOB_END_TIME"

# By number; of several requests the one with the highest number counts.
REASONS = {
    1: "the file requeue is in the run directory",
    2: "the file stop is in the run directory",
    3: "the allocation ends",
    4: "SIGTERM",
    5: "SIGUSR1",
    6: "SIGINT",
}
_REQUEUE, _STOP, _END, *_OF_SIGNALS = REASONS
_SECONDS_BETWEEN_LOOKS = 1.0
_INTERRUPTED = b"interrupted: the run saves after this step; Ctrl-C again ends it without saving\n"

logger = logging.getLogger(__name__)


class StopRequests:
    """The requests that a rank receives between `__enter__` and `__exit__`, on its main thread.

    After a request, later signals are ignored, after `__exit__` as well. Only a second SIGINT
    before `__exit__` ends the process at once: the user does not want to wait for the save.

    Args:
        run: The run directory. Rank 0 removes the file that stopped the previous job.
        end_margin_seconds: How long before the end of a Slurm allocation to stop; 0: never.
    """

    def __init__(self, run: RunDirectory, end_margin_seconds: float) -> None:
        self._files = {_STOP: run.stop_file, _REQUEUE: run.requeue_file}
        self._margin = end_margin_seconds
        self._end = _allocation_end(end_margin_seconds)
        self._received = 0
        self._is_interrupted = False
        self._next_look = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if is_first_rank():
            for file in self._files.values():
                file.unlink(missing_ok=True)
            left = self._end - time.time()
            if left < self._margin:
                logger.warning(
                    "%.0f minutes are left until checkpoint.end_margin_minutes = %g before the end "
                    "of the allocation: allocate more time, or lower it",
                    max(left, 0) / 60,
                    self._margin / 60,
                )
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._store_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A process that is about to end must not fail by another signal.
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self._received else handler)

    def received(self) -> int:
        """Return this rank's request as a number of `REASONS`, 0 without one."""
        return max(self._received, self._look())

    def _store_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._is_interrupted:
                end_by_signal(signal.SIGINT)
            self._is_interrupted = True
            if is_first_rank():
                # Not by the logger, whose lock the interrupted code may hold.
                os.write(sys.stderr.fileno(), _INTERRUPTED)
        self._received = _OF_SIGNALS[SIGNALS.index(signal.Signals(number))]

    def _look(self) -> int:
        """Check files and clock, on rank 0 only: all ranks would load the file system."""
        now = time.time()
        if not is_first_rank() or now < self._next_look:
            return 0
        self._next_look = now + _SECONDS_BETWEEN_LOOKS
        if now >= self._end:
            return _END
        return next((reason for reason, file in self._files.items() if file.exists()), 0)


def _allocation_end(margin_seconds: float) -> float:
    """Return when to stop: the margin before the end of the allocation, in seconds since 1970."""
    end = os.environ.get(END_TIME_VARIABLE, "")
    return float(end) - margin_seconds if margin_seconds > 0 and end.isdigit() else float("inf")
