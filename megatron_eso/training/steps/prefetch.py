"""Steps planned ahead, so that no step waits for its data."""

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch

from megatron_eso.objectives.objective import Step
from megatron_eso.training.steps.batches import StepPlan, TrainingBatches

# A read that hangs must not hold up the end of the process as well.
_CLOSE_SECONDS = 5.0


class StepPrefetcher:
    """Hands out this rank's step plans, planned ahead by a daemon thread.

    A plan is exactly `batches.plan_step(step, data_parallel_rank)`; where there is a GPU its
    tensors lie in pinned memory. One thread may take; leave the context to end the other.

    Args:
        batches: What plans.
        data_parallel_rank: Of this rank.
        steps_ahead: Plans that are kept ready at most; 0: each is made when it is taken.
    """

    def __init__(self, batches: TrainingBatches, data_parallel_rank: int, steps_ahead: int) -> None:
        self._batches = batches
        self._data_parallel_rank = data_parallel_rank
        self._steps_ahead = steps_ahead
        self._planner: _Planner | None = None
        self._next: Step | None = None

    def take(self, step: Step) -> StepPlan:
        """Return the plan of a step.

        Any other step than the one after the last (a resume, a rollback) starts anew there.

        Raises:
            DataError: What planning this step raised, unchanged.
        """
        if self._steps_ahead == 0:
            return self.plan(step)
        if self._planner is None or step != self._next:
            self.close()
            self._planner = _Planner(self.plan, step, self._steps_ahead)
        self._next = step.next()
        planned = self._planner.take()
        if isinstance(planned, BaseException):
            self.close()
            raise planned
        return planned

    def plan(self, step: Step) -> StepPlan:
        """Plan a step at once."""
        plan = self._batches.plan_step(step, self._data_parallel_rank)
        return plan.pin_memory() if torch.cuda.is_available() else plan

    def close(self) -> None:
        """End the thread and forget its plans; `take` may start another."""
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


class _Planner:
    """A thread that plans one step after the other, until it is closed or planning fails."""

    def __init__(self, plan: Callable[[Step], StepPlan], first: Step, steps_ahead: int) -> None:
        self._plan = plan
        self._step = first
        self._planned: queue.SimpleQueue[StepPlan | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(steps_ahead)
        self._closed = False
        # Threads begin on the first GPU, whichever is this rank's.
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def take(self) -> StepPlan | BaseException:
        """The next plan, or what planning it raised; waits for it."""
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
                self._planned.put(self._plan(self._step))
            except BaseException as error:  # or the thread that takes would wait without end
                self._planned.put(error)
                return
            self._step = self._step.next()
