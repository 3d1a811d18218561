"""Plans steps and validations ahead in a thread, so that no step waits for its data."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch

from megatron_eso.batches.rows import MicroBatch
from megatron_eso.objectives.objective import Step
from megatron_eso.training.steps.batches import StepPlan, TrainingBatches

_CLOSE_SECONDS = 5.0
"""How long to wait for the thread to end; a read that hangs must not delay the process's end."""
_MICRO_BATCHES_AHEAD = 4
"""The largest number of validation micro-batches that are kept ready."""

Plan = TypeVar("Plan")


@contextmanager
def plan_ahead(micro_batches: Iterator[MicroBatch]) -> Iterator[Iterator[MicroBatch]]:
    """Yield an iterator over the same micro-batches, which a thread makes ahead of time.

    With a GPU their tensors are in pinned memory. An error of `micro_batches` is raised unchanged
    where its micro-batch is waited for.
    """
    planner = _Planner(map(_pin, micro_batches), _MICRO_BATCHES_AHEAD)

    def take_all() -> Iterator[MicroBatch]:
        while not isinstance(planned := planner.take(), StopIteration):
            if isinstance(planned, BaseException):
                raise planned
            yield planned

    try:
        yield take_all()
    finally:
        planner.close()


def _pin(micro_batch: MicroBatch) -> MicroBatch:
    return micro_batch.pin_memory() if torch.cuda.is_available() else micro_batch


class StepPrefetcher:
    """This rank's step plans, which a daemon thread makes ahead of time.

    A plan equals `batches.plan_step(step, data_parallel_rank)`. With a GPU its tensors are in
    pinned memory. Only one thread may call `take`. The end of the context ends the daemon thread.

    Args:
        batches: The batches of the run, which plan the steps.
        data_parallel_rank: The number of this rank in its data-parallel group.
        steps_ahead: The largest number of plans that are kept ready; 0: a plan is made by `take`.
    """

    def __init__(self, batches: TrainingBatches, data_parallel_rank: int, steps_ahead: int) -> None:
        self._batches = batches
        self._data_parallel_rank = data_parallel_rank
        self._steps_ahead = steps_ahead
        self._planner: _Planner[StepPlan] | None = None
        self._next: Step | None = None

    def take(self, step: Step) -> StepPlan:
        """Return the plan of a step.

        If the step does not follow the last one (a resume, a rollback), planning starts again.

        Raises:
            DataError: Planning this step failed; the error is unchanged.
        """
        if self._steps_ahead == 0:
            return self.plan(step)
        if self._planner is None or step != self._next:
            self.close()
            self._planner = _Planner(self._plan_from(step), self._steps_ahead)
        self._next = step.next()
        planned = self._planner.take()
        if isinstance(planned, BaseException):
            self.close()
            raise planned
        return planned

    def plan(self, step: Step) -> StepPlan:
        """Plan a step in the calling thread."""
        plan = self._batches.plan_step(step, self._data_parallel_rank)
        return plan.pin_memory() if torch.cuda.is_available() else plan

    def _plan_from(self, step: Step) -> Iterator[StepPlan]:
        while True:
            yield self.plan(step)
            step = step.next()

    def close(self) -> None:
        """End the thread and drop its plans; `take` starts another one."""
        if self._planner is not None:
            self._planner.close()
            self._planner = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Planner(Generic[Plan]):
    """A thread that makes one plan after another until it is closed, or an error or the end."""

    def __init__(self, plans: Iterator[Plan], num_ahead: int) -> None:
        self._plans = plans
        self._planned: queue.SimpleQueue[Plan | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(num_ahead)
        self._closed = False
        # A new thread uses the first GPU, which may be another rank's.
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def take(self) -> Plan | BaseException:
        """Wait for the next plan, and return it or what ended the planning, once."""
        planned = self._planned.get()
        self._room.release()
        return planned

    def close(self) -> None:
        self._closed = True
        self._room.release()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        while True:
            self._room.acquire()
            if self._closed:
                return
            try:
                self._planned.put(next(self._plans))
            except BaseException as error:  # the thread that calls `take` waits for an answer
                self._planned.put(error)
                return
