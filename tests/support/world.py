"""Ranks for tests: worker processes over gloo that stay alive from one test to the next.

Importing torch and megatron costs seconds per process. A `World` imports them once, forks workers
from there when they are first needed, and keeps these. Each `run` gives them a process group of
their own:

    def add_up(start):  # in a module of tests/ranks, which the workers import
        tensor = torch.tensor(start + dist.get_rank())
        dist.all_reduce(tensor)
        return int(tensor)

    def test_sum(world):
        assert world.run(add_up, 2, 5) == [11, 11]

Functions, arguments and results travel by pickle. Workers install the CPU backend before they
import a function's module, so that the modules of tests/ranks import megatron at their top;
megatron's parallel state is destroyed after each call. A call that hangs, or a worker that dies,
fails that call only: the workers are killed and the next call starts others.
"""

import gc
import importlib
import math
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

import psutil

from tests.support.processes import HANG_SECONDS

MAX_RANKS = 4
GRACE_SECONDS = 60.0  # for the other ranks once one has failed, and for a worker to leave
JOIN_SECONDS = 60.0  # imports are done; now and then gloo loses a connection on a busy machine
COLLECTIVE_SECONDS = 2 * HANG_SECONDS  # no rank gives up before the call has ended
JOIN_TRIES = 3
MAX_THREADS = 60  # of a worker at rest, which has fewer than 10
WORKER_IMPORTS = "tests.support.worker_imports"
LOADED, JOINED, GO = b"loaded", b"joined", b"go"


class RankError(AssertionError):
    """A rank raised or died; the message holds its traceback, `__cause__` what it raised."""


class WorldTimeoutError(RankError):
    """Some ranks did not return in time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One function to run on one rank."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    rank: int
    num_ranks: int
    store: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The result of a rank: a value, or a traceback and, where it pickles, the exception."""

    value: Any = None
    failure: str | None = None
    failed_at: float = math.inf
    """By the machine's clock: the others fail in their collectives, but later."""
    exception: BaseException | None = None


class World:
    """A pool of at most `MAX_RANKS` worker processes; tests get it from the fixture `world`.

    Attributes:
        num_rejoins: How often workers were started anew because they could not meet.
    """

    def __init__(self) -> None:
        # A process that has imported torch and megatron once is forked for each worker.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([WORKER_IMPORTS])
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="world_")
        self._num_calls = 0
        self.num_rejoins = 0

    def run(
        self,
        function: Callable[..., Any],
        num_ranks: int,
        *args: Any,
        timeout_seconds: float = HANG_SECONDS,
    ) -> list[Any]:
        """Run `function(*args)` on ranks 0 .. num_ranks-1 of a fresh gloo process group.

        Args:
            function: a module-level function.
            num_ranks: 1 .. MAX_RANKS.
            *args: the same for each rank.
            timeout_seconds: after this the workers are killed.

        Returns:
            What each rank returned, by rank.

        Raises:
            RankError: of the rank that failed first.
            WorldTimeoutError: naming the ranks that were still running.
        """
        if not 1 <= num_ranks <= MAX_RANKS:
            raise ValueError(f"num_ranks is {num_ranks}, must be 1 .. {MAX_RANKS}")
        try:
            early = self._send(function, num_ranks, args)
            outcomes = self._collect(num_ranks, timeout_seconds, early)
        except BaseException:  # an interrupt, or the test's own time limit
            self.kill()
            raise
        silent = [rank for rank in range(num_ranks) if rank not in outcomes]
        if silent:
            self.kill()
        failed = [rank for rank, outcome in outcomes.items() if outcome.failure is not None]
        if failed:
            first = min(failed, key=lambda rank: outcomes[rank].failed_at)
            outcome = outcomes[first]
            raise RankError(f"rank {first}: {outcome.failure}") from outcome.exception
        if silent:
            raise WorldTimeoutError(f"ranks {silent} did not return in {timeout_seconds:g} s")
        return [outcomes[rank].value for rank in range(num_ranks)]

    def kill(self) -> None:
        """End the workers at once; the next `run` starts others."""
        for process, link in self._workers:
            process.kill()
            link.close()
        for process, _ in self._workers:
            process.join()
        self._workers.clear()

    def close(self) -> None:
        """Have the workers end, and remove the rendezvous files."""
        for _, link in self._workers:
            link.close()
        for process, _ in self._workers:
            process.join(GRACE_SECONDS)
        self.kill()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, num_ranks: int) -> None:
        # The hooks of Megatron-Core's data parallelism keep groups, whose threads poll.
        if any(is_worn(process) for process, _ in self._workers):
            self.kill()
        os.environ["OMP_NUM_THREADS"] = "1"  # read by the workers when they start
        while len(self._workers) < num_ranks:
            here, there = self._context.Pipe()
            # Not daemonic: megatron's checkpoint writer starts processes of its own.
            process = self._context.Process(target=serve, args=(there,))
            process.start()
            there.close()
            self._workers.append((process, here))

    def _send(
        self,
        function: Callable[..., Any],
        num_ranks: int,
        args: tuple[Any, ...],
    ) -> dict[int, bytes]:
        """Have the ranks begin a call, in a process group that all have joined.

        Returns:
            The outcomes of ranks that could not join, by rank.
        """
        for _ in range(JOIN_TRIES):
            self._num_calls += 1
            self._start(num_ranks)
            for rank, (_, link) in enumerate(self._workers[:num_ranks]):
                call = Call(
                    function=function,
                    args=args,
                    rank=rank,
                    num_ranks=num_ranks,
                    store=os.path.join(self._folder.name, f"store_{self._num_calls}"),
                )
                link.send_bytes(pickle.dumps(call))
            early = self._receive_all(num_ranks, LOADED, HANG_SECONDS)
            if early:
                return early
            if early is not None and self._receive_all(num_ranks, JOINED, JOIN_SECONDS) == {}:
                for _, link in self._workers[:num_ranks]:
                    link.send_bytes(GO)
                return early
            self.num_rejoins += 1
            self.kill()
        raise WorldTimeoutError(f"{num_ranks} ranks could not meet in {JOIN_TRIES} tries")

    def _receive_all(
        self, num_ranks: int, expected: bytes, seconds: float
    ) -> dict[int, bytes] | None:
        """Receive the expected message from every rank.

        Returns:
            What ranks sent instead, by rank; None where one sent nothing.
        """
        others, deadline = {}, time.monotonic() + seconds
        for rank, (_, link) in enumerate(self._workers[:num_ranks]):
            if not link.poll(max(0.0, deadline - time.monotonic())):
                return others or None
            message = receive(link)
            if message != expected:
                others[rank] = message
        return others

    def _collect(
        self, num_ranks: int, timeout_seconds: float, early: dict[int, bytes]
    ) -> dict[int, Outcome]:
        """Collect outcomes by rank in order of arrival; those of late ranks are missing."""
        outcomes = {rank: pickle.loads(message) for rank, message in early.items()}
        waiting = {
            link: rank
            for rank, (_, link) in enumerate(self._workers[:num_ranks])
            if rank not in early
        }
        deadline = time.monotonic() + (GRACE_SECONDS if early else timeout_seconds)
        while waiting and (left := deadline - time.monotonic()) > 0:
            for link in wait(list(waiting), timeout=left):
                assert isinstance(link, Connection)
                message = receive(link)
                if message in (LOADED, JOINED):  # of a rank whose neighbour could not load
                    continue
                rank = waiting.pop(link)
                outcomes[rank] = pickle.loads(message)
                if outcomes[rank].failed_at == -math.inf:
                    return outcomes  # it died, which the others' collectives need not notice
                if outcomes[rank].failure is not None:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return outcomes


def is_worn(process: BaseProcess) -> bool:
    """Return whether a worker has ended, or has many threads of earlier process groups."""
    return not process.is_alive() or psutil.Process(process.pid).num_threads() > MAX_THREADS


def receive(link: Connection) -> bytes:
    """Receive a worker's message; its death is an outcome as well."""
    try:
        return link.recv_bytes()
    except EOFError:
        return pickle.dumps(Outcome(failure="its process died", failed_at=-math.inf))


def serve(link: Connection) -> None:
    """Run calls and send their outcomes, until the pipe is closed."""
    importlib.import_module(WORKER_IMPORTS)  # it is there, unless the fork server has failed to
    while True:
        try:
            call = link.recv_bytes()
            link.send_bytes(answer(call, link))
        except (EOFError, OSError):
            return


def answer(call: bytes, link: Connection) -> bytes:
    """Run a pickled call and pickle its outcome, whichever of these fails."""
    try:
        loaded = pickle.loads(call)  # it imports the function's module
        return pickle.dumps(Outcome(value=execute(loaded, link)))
    except Exception as error:
        failure, failed_at = traceback.format_exc(), getattr(error, "failed_at", math.inf)
        try:
            copy = pickle.dumps(Outcome(failure=failure, failed_at=failed_at, exception=error))
            pickle.loads(copy)
        except Exception:  # an exception that cannot be unpickled: its traceback can
            return pickle.dumps(Outcome(failure=failure, failed_at=failed_at))
        return copy


def execute(call: Call, link: Connection) -> Any:
    """Run one call inside its process group; report on the link what is loaded and has joined."""
    import torch
    import torch.distributed as dist

    link.send_bytes(LOADED)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(call.store, call.num_ranks),
        rank=call.rank,
        world_size=call.num_ranks,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    link.send_bytes(JOINED)
    try:
        assert link.recv_bytes() == GO
        value = call.function(*call.args)
        dist.barrier()  # the group does not end while a rank still uses it
    except Exception as error:
        # Before the group ends, and the others' calls with it.
        error.failed_at = time.monotonic()  # type: ignore[attr-defined]
        raise
    finally:
        parallel_state = sys.modules.get("megatron.core.parallel_state")
        if parallel_state is not None:
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        # Circles of objects hold groups; the threads of a group poll a hundred times a second.
        gc.collect()
    return value
