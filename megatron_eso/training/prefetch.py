"""Steps planned ahead, so that no step waits for its data."""

import itertools
import queue
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

import torch

from megatron_eso.training.batches import StepPlan, TrainingBatches

# A read that hangs must not hold up the end of the process as well.
_CLOSE_SECONDS = 5.0


class StepPrefetcher:
    """Hands out this rank's step plans, planned ahead by a daemon thread.

    A plan is exactly `batches.plan_step(consumed_samples, data_parallel_rank)`; where there is a
    GPU its tensors lie in pinned memory. One thread may take; leave the context to end the other.

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
        self._next_place = 0

    def take(self, consumed_samples: int) -> StepPlan:
        """The plan of the step after `consumed_samples` samples.

        Any other place than the one after the last step (a resume, a rollback) starts anew there.

        Raises:
            DataError: What planning this step raised, unchanged.
        """
        if self._steps_ahead == 0:
            return self.plan(consumed_samples)
        if self._planner is None or consumed_samples != self._next_place:
            self.close()
            places = itertools.count(consumed_samples, self._batches.dealing.global_batch_size)
            self._planner = _Planner(self.plan, places, self._steps_ahead)
        self._next_place = consumed_samples + self._batches.dealing.global_batch_size
        planned = self._planner.take()
        if isinstance(planned, BaseException):
            self.close()
            raise planned
        return planned

    def plan(self, consumed_samples: int) -> StepPlan:
        """Plan a step at once."""
        plan = self._batches.plan_step(consumed_samples, self._data_parallel_rank)
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

    def __init__(
        self, plan: Callable[[int], StepPlan], places: Iterable[int], steps_ahead: int
    ) -> None:
        self._plan = plan
        self._places = places
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
        for place in self._places:
            self._room.acquire()
            if self._closed:
                return
            try:
                self._planned.put(self._plan(place))
            except BaseException as error:  # or the thread that takes would wait without end
                self._planned.put(error)
                return
