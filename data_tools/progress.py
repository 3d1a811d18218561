"""Progress of long work on stderr: share done, speed, time left."""

import sys
import time


class Progress:
    """Reports bytes done of a total: a line that renews itself on a terminal, else now and then."""

    def __init__(self, label: str, total_bytes: int) -> None:
        self._label = label
        self._total = max(1, total_bytes)
        self._done = 0
        self._start = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        self._interval_seconds = 0.5 if self._is_terminal else 10.0
        self._next = self._start + self._interval_seconds

    def advance(self, num_bytes: int) -> None:
        """Count bytes as done and report if it is time."""
        self._done += num_bytes
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._interval_seconds
            self._write(now)

    def finish(self) -> float:
        """Report the end.

        Returns:
            Seconds taken.
        """
        now = time.monotonic()
        self._write(now)
        if self._is_terminal:
            sys.stderr.write("\n")
        return now - self._start

    def _write(self, now: float) -> None:
        seconds = max(now - self._start, 1e-9)
        left = seconds * (self._total - self._done) / max(1, self._done)
        line = (
            f"{self._label}: {100 * self._done / self._total:.0f} %, "
            f"{self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB, "
            f"{self._done / 1e6 / seconds:.1f} MB/s, {_clock(seconds)} elapsed, {_clock(left)} left"
        )
        sys.stderr.write(f"\r{line:<100}" if self._is_terminal else f"{line}\n")
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
