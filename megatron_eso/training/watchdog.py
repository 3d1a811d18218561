"""Ends a job that hangs, and says where: a deadline for every phase of the run.

Each rank watches itself. A thread tells the others through the process group's store, every few
seconds, which phase the rank is in; when the rank's own phase is overdue, the thread writes what is
known of every rank, and the stacks of all threads here, into the rank's log, and ends the process
with code 1; the launcher then ends the job. A rank that is frozen or gone cannot write: the
others, who wait for it in a collective, name it by its silence. Should the interpreter itself be
stuck, Python's faulthandler writes the stacks and ends the process without its help.
"""

import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

EXIT_CODE = 1
_STORE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a rank says of itself."""

    host: str
    pid: int
    phase: str
    since: float
    """Seconds since the epoch at which the phase began."""
    told: float
    """Seconds since the epoch at which this was said."""


class Watchdog:
    """Watches this rank between `__enter__` and `__exit__`.

    Args:
        log: File that the report is appended to; it goes to stderr as well.
        deadlines: Seconds that each phase may take, by name; 0: any time.
        interval_seconds: Seconds between two looks.
        store: Of the process group; none for a process alone.
        rank: This rank.
        num_ranks: Ranks of the world.
        grace_seconds: After the deadline, for the report, before faulthandler ends the process.
    """

    def __init__(
        self,
        log: Path,
        deadlines: Mapping[str, float],
        *,
        interval_seconds: float,
        store: Store | None,
        rank: int,
        num_ranks: int,
        grace_seconds: float = 20.0,
    ) -> None:
        self._grace = grace_seconds
        self._log = log.open("a")
        self._deadlines = deadlines
        self._interval = interval_seconds
        self._store = None if store is None else PrefixStore("watchdog", store)
        self._rank, self._num_ranks = rank, num_ranks
        self._phase: tuple[str, float, float] | None = None  # text, began, overdue at
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()
        self._log.close()

    @contextmanager
    def phase(self, name: str, detail: str = "") -> Iterator[None]:
        """Hold the enclosed work to the deadline of `name`; phases do not nest.

        Args:
            name: A key of the deadlines.
            detail: Put behind the name in reports, such as the step.
        """
        deadline, now = self._deadlines[name] or math.inf, time.time()
        if deadline < math.inf:
            faulthandler.dump_traceback_later(deadline + self._grace, exit=True, file=self._log)
        self._phase = (f"{name} {detail}".strip(), now, now + deadline)
        try:
            yield
        finally:
            self._phase = None
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            phase, now = self._phase, time.time()
            if phase is not None and now > phase[2]:
                self._end_process(phase[0], now - phase[1])
            self._tell(phase, now)

    def _tell(self, phase: tuple[str, float, float] | None, now: float) -> None:
        if self._store is None:
            return
        text, since = ("between phases", now) if phase is None else phase[:2]
        beat = [socket.gethostname(), os.getpid(), text, since, now]
        try:
            self._store.set(str(self._rank), json.dumps(beat))
        except RuntimeError:  # the store's process is gone: the deadline will tell
            return

    def _end_process(self, phase: str, seconds: float) -> None:
        self._write(
            f"watchdog: rank {self._rank} on {socket.gethostname()} (process {os.getpid()}) has "
            f"been in phase {phase!r} for {seconds:.0f} s: ending the job; stacks follow"
        )
        for stream in (self._log, sys.stderr):
            faulthandler.dump_traceback(stream, all_threads=True)
            stream.flush()
        for line in self._describe_ranks():
            self._write(line)
        os._exit(EXIT_CODE)

    def _describe_ranks(self) -> Iterator[str]:
        """One line for every rank, from what it said last."""
        if self._store is None:
            return
        self._store.set_timeout(timedelta(seconds=_STORE_SECONDS))
        now = time.time()
        for rank in range(self._num_ranks):
            try:
                beat = Heartbeat(*json.loads(self._store.get(str(rank))))
            except (RuntimeError, ValueError) as error:
                yield f"watchdog: rank {rank}: never heard of ({type(error).__name__})"
                continue
            silence = now - beat.told
            silent = f", SILENT for {silence:.0f} s" if silence > 3 * self._interval else ""
            yield (
                f"watchdog: rank {rank} on {beat.host} (process {beat.pid}): in phase "
                f"{beat.phase!r} for {now - beat.since:.0f} s{silent}"
            )

    def _write(self, line: str) -> None:
        for stream in (self._log, sys.stderr):
            stream.write(line + "\n")
            stream.flush()
