"""Progress of long work on stderr: share done, speed, time left."""

import sys
import time


class Progress:
    """Reports bytes done of a total: a line that renews itself on a terminal, else now and then.

    Args:
        label: of the work.
        total_bytes: of all of it; 0 where nobody knows.
        done_bytes: what an earlier run has done, which does not count for the speed.
    """

    def __init__(self, label: str, total_bytes: int, done_bytes: int = 0) -> None:
        self._label = label
        self._total = total_bytes
        self._earlier = done_bytes
        self._done = done_bytes
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
        speed = (self._done - self._earlier) / seconds
        parts = [f"{self._done / 1e6:.1f} MB"]
        if self._total:
            parts = [
                f"{100 * self._done / self._total:.0f} %",
                f"{self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB",
            ]
        parts += [f"{speed / 1e6:.1f} MB/s", f"{_clock(seconds)} elapsed"]
        if self._total and speed:
            parts.append(f"{_clock((self._total - self._done) / speed)} left")
        line = f"{self._label}: {', '.join(parts)}"
        sys.stderr.write(f"\r{line:<100}" if self._is_terminal else f"{line}\n")
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
