"""Ends a job that hangs, by a deadline for every kind of work, and reports where it hangs.

Each rank watches itself. Every few seconds a thread writes the work of the rank to the process
group's store. When this work is overdue, the thread reports the state of every rank and the stacks
of all threads of this process to stderr and to the rank's log, and ends the process with code 1.
The launcher then ends the job. A frozen or dead rank cannot report: the ranks that wait for it in
a collective name it, since its entry in the store is old. If the interpreter is blocked, or the
file system blocks the report, Python's faulthandler ends the process.
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

from torch._C import _distributed_c10d
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import (
    _get_default_store,
    get_backend,
    get_world_size,
    is_initialized,
)

from megatron_eso.config.sections import WatchdogConfig
from megatron_eso.ranks import own_rank

EXIT_CODE = 1
HEARTBEAT_SECONDS = 5.0
COLLECTIVES_PREFIX = "collectives_"
"""Begins the names of the files with a rank's last collectives; its number ends them."""
# For a read of the store, whose host may have died.
_STORE_SECONDS = 5.0
_JOIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The last entry of a rank in the store."""

    host: str
    pid: int
    work: str
    since: float
    """Seconds since the epoch at which the work began."""
    written: float
    """Seconds since the epoch at which this was written."""


@dataclass(frozen=True, slots=True)
class WatchedWork:
    """The work of this rank, and its deadline."""

    text: str
    since: float
    """Seconds since the epoch."""
    overdue_at: float
    """By the monotonic clock, which cannot be set."""


class Watchdog:
    """The watchdog of this rank, from `__enter__` to `__exit__`.

    Args:
        log: File to which the report is appended; it goes to stderr as well.
        deadlines: Seconds for each kind of work, by its name; 0: no deadline.
        interval_seconds: Seconds between two checks.
        store: The store of the process group; None: a process without others.
        rank: This rank.
        num_ranks: Ranks of the world.
        grace_seconds: Seconds for the report, after which faulthandler ends the process.
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
        # A second connection: a wait of the process group locks the first one.
        if store is not None and hasattr(store, "clone"):  # from torch 2.8 on
            store = store.clone()
        self._store = None if store is None else PrefixStore("watchdog", store)
        self._rank, self._num_ranks = rank, num_ranks
        self._work: WatchedWork | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._write_heartbeat(None)
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
    def deadline(self, name: str, detail: str = "") -> Iterator[None]:
        """Apply the deadline of `name` to the enclosed work; deadlines do not nest.

        Args:
            name: A key of the deadlines.
            detail: Follows the name in reports, such as the step.
        """
        seconds = self._deadlines[name] or math.inf
        if seconds < math.inf:
            faulthandler.dump_traceback_later(seconds + self._grace, exit=True)
        overdue_at = time.monotonic() + seconds
        self._work = WatchedWork(f"{name} {detail}".strip(), time.time(), overdue_at)
        try:
            yield
        finally:
            self._work = None
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            work = self._work
            if work is not None and time.monotonic() > work.overdue_at:
                self._end_process(work)
            self._write_heartbeat(work)

    def _write_heartbeat(self, work: WatchedWork | None) -> None:
        if self._store is None:
            return
        now = time.time()
        text, since = ("no watched work", now) if work is None else (work.text, work.since)
        beat = [socket.gethostname(), os.getpid(), text, since, now]
        with suppress(RuntimeError):  # the store's process has died: a deadline will end this one
            self._store.set(str(self._rank), json.dumps(beat))

    def _end_process(self, work: WatchedWork) -> None:
        now = time.time()
        first = (
            f"watchdog: rank {self._rank} on {socket.gethostname()} (process {os.getpid()}) has "
            f"been in {work.text!r} for {now - work.since:.0f} s: ending the job; "
            f"stacks follow\n"
        )
        report = [first + dump_stacks(), ""]
        # stderr before the log, whose file system may hang; the stacks before the other ranks.
        sys.stderr.write(report[0])
        sys.stderr.flush()
        report[1] = "".join(f"watchdog: {line}\n" for line in self._describe_ranks(work, now))
        sys.stderr.write(report[1])
        sys.stderr.flush()
        with self._log.open("a") as log:
            log.writelines(report)
        dump_collectives(self._log.with_name(f"{COLLECTIVES_PREFIX}{self._log.stem}"))
        os._exit(EXIT_CODE)

    def _describe_ranks(self, work: WatchedWork, now: float) -> Iterator[str]:
        """Describe the ranks: one line for all with the work of this one, a line for each other."""
        if self._store is None:
            return
        alike: Counter[str] = Counter()
        odd = []
        for rank, beat in self._read_heartbeats().items():
            if beat is None:
                odd.append(f"rank {rank}: no heartbeat yet, or the store does not answer")
                continue
            silence = now - beat.written
            is_silent = silence > 3 * self._interval
            if beat.work == work.text and not is_silent:
                alike[beat.host] += 1
                continue
            silent = f", SILENT for {silence:.0f} s" if is_silent else ""
            odd.append(
                f"rank {rank} on {beat.host} (process {beat.pid}): in {beat.work!r} for "
                f"{now - beat.since:.0f} s{silent}"
            )
        hosts = ", ".join(f"{number} on {host}" for host, number in sorted(alike.items()))
        yield f"{alike.total()} of {self._num_ranks} ranks are in {work.text!r}: {hosts}"
        yield from odd

    def _read_heartbeats(self) -> dict[int, Heartbeat | None]:
        """Read the last heartbeat of every rank; None where the store does not answer in time."""
        beats: dict[int, Heartbeat | None] = dict.fromkeys(range(self._num_ranks))

        def read() -> None:
            assert self._store is not None
            for rank in beats:
                with suppress(RuntimeError, ValueError):
                    if self._store.check([str(rank)]):
                        beats[rank] = Heartbeat(*json.loads(self._store.get(str(rank))))

        assert self._store is not None
        self._store.set_timeout(timedelta(seconds=_STORE_SECONDS))
        reading = threading.Thread(target=read, daemon=True)
        reading.start()
        reading.join(_STORE_SECONDS)
        return dict(beats)


def build_watchdog(config: WatchdogConfig, log: Path) -> Watchdog:
    """Build this rank's watchdog; the process group exists already.

    Args:
        config: The deadlines.
        log: This rank's log file.
    """
    deadlines = {
        "start": config.start_seconds,
        # It allocates memory, compiles kernels and reads data that no thread has read ahead.
        "first step": _longer(config.start_seconds, config.step_seconds),
        "train step": config.step_seconds,
        "validation": config.validation_seconds,
        "checkpoint": config.checkpoint_seconds,
    }
    # A dead rank must be noticed within the shortest deadline.
    shortest = min(filter(None, deadlines.values()), default=math.inf)
    return Watchdog(
        log,
        deadlines,
        interval_seconds=min(HEARTBEAT_SECONDS, shortest / 4),
        store=_get_default_store(),
        rank=own_rank(),
        num_ranks=get_world_size(),
    )


def _longer(*deadlines: float) -> float:
    """Return the longest deadline; 0 means no deadline and is the longest."""
    return 0.0 if 0.0 in deadlines else max(deadlines)


def dump_collectives(path: Path) -> None:
    """Write the last collectives of this rank to a file, as torch's flight recorder has them.

    `torchfrtrace FOLDER --prefix collectives_rank_` compares the files of the ranks. Nothing is
    written without a process group.
    """
    if not is_initialized():
        return
    name = "_dump_nccl_trace" if get_backend() == "nccl" else "_dump_fr_trace"
    dump = getattr(_distributed_c10d, name, None)  # gloo's is there from torch 2.8 on
    if dump is not None:
        path.write_bytes(dump())


def dump_stacks() -> str:
    """Return the stacks of all threads of this process."""
    with open(os.memfd_create("stacks"), "w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
