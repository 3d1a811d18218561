"""Work on tasks in several processes, with the results in the order of the tasks."""

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
    """Yield every task with its result, in order; a few tasks per worker are held at a time.

    Workers end when this process does, whatever ends it.

    Args:
        work: done on each task; it is sent to each worker once. What it raises is raised here when
            the task's turn comes.
        tasks: taken one by one as results are needed.
        num_workers: processes; 1 works in this one.

    Raises:
        DataError: a worker died.
    """
    if num_workers == 1:
        for task in tasks:
            yield task, work(task)
        return
    # Started afresh, not forked: a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_start_worker, initargs=(work,)
    )
    pending: deque[tuple[Task, Future[Result]]] = deque()
    remaining = iter(tasks)
    try:
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
            "a worker process died, perhaps for want of memory; run again with fewer --workers"
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
    """End this worker when its parent ends: if that was killed, no task would ever come."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(task: Any) -> Any:
    return _worker_work(task)
