"""Writes the status of a running run in a thread, so that no step waits for the file system."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

WAIT_SECONDS = 10.0
"""How long the last status waits for the one before it; a file system may hang."""


@dataclass(slots=True)
class StatusWriter:
    """A thread for one write at a time. Only one thread may call the methods."""

    _thread: threading.Thread | None = field(init=False, default=None)

    def start(self, write: Callable[[], None]) -> None:
        """Call `write` in a thread; if the write before it has not ended, leave this one out."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._thread = threading.Thread(target=write, name="status", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the write that has begun, so that a later status is not replaced by it."""
        if self._thread is not None:
            self._thread.join(WAIT_SECONDS)
