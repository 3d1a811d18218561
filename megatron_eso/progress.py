"""Progress reports of long work: share done, speed and time left."""

import sys
import threading
import time
from collections.abc import Callable

from megatron_eso.quantities import format_mb, format_seconds

_REPORT_SECONDS = 10.0
_TERMINAL_SECONDS = 0.5


class Progress:
    """A count of the bytes that are done, which reports progress; several threads may count.

    It reports one line every 10 seconds. On a terminal, it renews one line instead.

    Args:
        label: Name of the work.
        total_bytes: Bytes of the whole work; 0 where they are unknown.
        done_bytes: Bytes that an earlier run has done; they do not count for the speed.
        report: Receives each line, for example a logger's `info`; None: write to stderr.
    """

    def __init__(
        self,
        label: str,
        total: int,
        done: int = 0,
        report: Callable[[str], None] | None = None,
        *,
        unit: str | None = None,
    ) -> None:
        self._label = label
        self._total = total
        self._earlier = done
        self._done = done
        self._unit = unit
        self._report = report
        self._start = time.monotonic()
        self._is_terminal = report is None and sys.stderr.isatty()
        self._interval_seconds = _TERMINAL_SECONDS if self._is_terminal else _REPORT_SECONDS
        self._next = self._start + self._interval_seconds
        self._lock = threading.Lock()

    def advance(self, number: int) -> None:
        """Add bytes or parts that are done, or remove them, and report every few seconds."""
        with self._lock:
            self._done += number
            now = time.monotonic()
            if now >= self._next:
                self._next = now + self._interval_seconds
                self._write(now)

    def finish(self) -> float:
        """Report the end.

        Returns:
            The seconds since the start.
        """
        now = time.monotonic()
        self._write(now)
        if self._is_terminal:
            sys.stderr.write("\n")
        return now - self._start

    def _write(self, now: float) -> None:
        line = self._describe(max(now - self._start, 1e-9))
        if self._report is not None:
            self._report(line)
            return
        sys.stderr.write(f"\r{line:<100}" if self._is_terminal else f"{line}\n")
        sys.stderr.flush()

    def _describe(self, seconds: float) -> str:
        speed = (self._done - self._earlier) / seconds
        parts = [f"{100 * self._done / self._total:.0f} %"] if self._total else []
        if self._unit is not None:
            parts.append(f"{self._done} of {self._total} {self._unit}")
        else:
            done = f"{self._done / 1e6:.1f} of " if self._total else ""
            parts += [f"{done}{format_mb(self._total or self._done)}", f"{format_mb(speed)}/s"]
        parts.append(f"{format_seconds(seconds)} elapsed")
        if self._total and speed:
            left_seconds = (self._total - self._done) / speed
            parts.append(f"{format_seconds(left_seconds)} left")
        return f"{self._label}: {', '.join(parts)}"
