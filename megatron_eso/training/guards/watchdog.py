"""Ends a job that hangs, and says where: a deadline for every phase of the run.

Each rank watches itself. A thread tells the others through the process group's store, every few
seconds, which phase the rank is in; when the rank's own phase is overdue, the thread writes what is
known of every rank, and the stacks of all threads here, to stderr and into the rank's log, and ends
the process with code 1; the launcher then ends the job. A rank that is frozen or gone cannot write:
the others, who wait for it in a collective, name it by its silence. Should the interpreter itself
be stuck, or a file system not take the report, Python's faulthandler ends the process.
"""

import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

EXIT_CODE = 1
# Of a look at a store that may be gone with its host.
_STORE_SECONDS = 5.0
_JOIN_SECONDS = 5.0


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


@dataclass(frozen=True, slots=True)
class Phase:
    """What this rank is doing."""

    text: str
    since: float
    """Seconds since the epoch."""
    overdue_at: float
    """By the monotonic clock: nobody sets it."""


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
        self._log = log
        self._deadlines = deadlines
        self._interval = interval_seconds
        # A connection of its own: the process group may be waiting in the other one, locked.
        if store is not None and hasattr(store, "clone"):  # from torch 2.8 on
            store = store.clone()
        self._store = None if store is None else PrefixStore("watchdog", store)
        self._rank, self._num_ranks = rank, num_ranks
        self._phase: Phase | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._tell(None)
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
        self._thread.join(_JOIN_SECONDS)

    @contextmanager
    def phase(self, name: str, detail: str = "") -> Iterator[None]:
        """Hold the enclosed work to the deadline of `name`; phases do not nest.

        Args:
            name: A key of the deadlines.
            detail: Put behind the name in reports, such as the step.
        """
        deadline = self._deadlines[name] or math.inf
        if deadline < math.inf:
            faulthandler.dump_traceback_later(deadline + self._grace, exit=True)
        self._phase = Phase(f"{name} {detail}".strip(), time.time(), time.monotonic() + deadline)
        try:
            yield
        finally:
            self._phase = None
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            phase = self._phase
            if phase is not None and time.monotonic() > phase.overdue_at:
                self._end_process(phase)
            self._tell(phase)

    def _tell(self, phase: Phase | None) -> None:
        if self._store is None:
            return
        now = time.time()
        text, since = ("between phases", now) if phase is None else (phase.text, phase.since)
        beat = [socket.gethostname(), os.getpid(), text, since, now]
        with suppress(RuntimeError):  # the store's process is gone: the deadline will tell
            self._store.set(str(self._rank), json.dumps(beat))

    def _end_process(self, phase: Phase) -> None:
        now = time.time()
        first = (
            f"watchdog: rank {self._rank} on {socket.gethostname()} (process {os.getpid()}) has "
            f"been in phase {phase.text!r} for {now - phase.since:.0f} s: ending the job; "
            f"stacks follow\n"
        )
        report = [first + dump_stacks(), ""]
        # stderr before the log, whose file system may be what hangs. The stacks before the others.
        sys.stderr.write(report[0])
        sys.stderr.flush()
        report[1] = "".join(f"watchdog: {line}\n" for line in self._describe_ranks(phase, now))
        sys.stderr.write(report[1])
        sys.stderr.flush()
        with self._log.open("a") as log:
            log.writelines(report)
        os._exit(EXIT_CODE)

    def _describe_ranks(self, phase: Phase, now: float) -> Iterator[str]:
        """A line for every rank that does other than this one, and one for all that do the same."""
        if self._store is None:
            return
        alike: Counter[str] = Counter()
        odd = []
        for rank, beat in self._ask_ranks().items():
            if beat is None:
                odd.append(f"rank {rank}: never heard of, or the store does not answer")
                continue
            silence = now - beat.told
            is_silent = silence > 3 * self._interval
            if beat.phase == phase.text and not is_silent:
                alike[beat.host] += 1
                continue
            silent = f", SILENT for {silence:.0f} s" if is_silent else ""
            odd.append(
                f"rank {rank} on {beat.host} (process {beat.pid}): in phase {beat.phase!r} for "
                f"{now - beat.since:.0f} s{silent}"
            )
        hosts = ", ".join(f"{number} on {host}" for host, number in sorted(alike.items()))
        yield f"{alike.total()} of {self._num_ranks} ranks are in phase {phase.text!r}: {hosts}"
        yield from odd

    def _ask_ranks(self) -> dict[int, Heartbeat | None]:
        """What every rank said last, as far as the store tells within its time."""
        beats: dict[int, Heartbeat | None] = dict.fromkeys(range(self._num_ranks))

        def ask() -> None:
            assert self._store is not None
            for rank in beats:
                with suppress(RuntimeError, ValueError):
                    if self._store.check([str(rank)]):
                        beats[rank] = Heartbeat(*json.loads(self._store.get(str(rank))))

        assert self._store is not None
        self._store.set_timeout(timedelta(seconds=_STORE_SECONDS))
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_STORE_SECONDS)
        return dict(beats)


def dump_stacks() -> str:
    """The stacks of all threads of this process."""
    with open(os.memfd_create("stacks"), "w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
