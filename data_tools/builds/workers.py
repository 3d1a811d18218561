"""Runs tasks in several processes and yields the results in the order of the tasks."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from megatron_eso.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")

_TASKS_PER_WORKER = 3


def map_in_order(
    work: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int
) -> Generator[tuple[Task, Result]]:
    """Yield every task with its result, in order, with a few tasks per worker in memory.

    The workers end when this process ends, even by a kill.

    Args:
        work: The function of a task, sent once to each worker. Its errors are raised here when the
            task's turn comes.
        tasks: The tasks, taken one by one as results are needed.
        num_workers: Number of processes; 1 runs all tasks in this process.

    Raises:
        DataError: A worker died.
    """
    if num_workers == 1:
        for task in tasks:
            yield task, work(task)
        return
    # Spawned, not forked: a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_start_worker, initargs=(work,)
    )
    pending: deque[tuple[Task, Future[Result]]] = deque()
    remaining = iter(tasks)
    try:
        # One new task is submitted for each result that is taken.
        for task in itertools.islice(remaining, _TASKS_PER_WORKER * num_workers):
            pending.append((task, pool.submit(_work, task)))
        while pending:
            done, future = pending.popleft()
            result = future.result()
            for task in itertools.islice(remaining, 1):
                pending.append((task, pool.submit(_work, task)))
            yield done, result
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died, perhaps for lack of memory; run again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker_work: Callable[[Any], Any]


def _start_worker(work: Callable[[Any], Any]) -> None:
    global _worker_work
    _worker_work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent ends: a killed parent sends no more tasks."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(task: Any) -> Any:
    return _worker_work(task)
