"""When a run saves: by steps, by the clock, at its end; and again where a save has failed."""

import logging
import math
import time
from dataclasses import dataclass, field
from functools import partial

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_eso.config.sections import Config
from megatron_eso.errors import CheckpointError
from megatron_eso.retries import retry
from megatron_eso.training.checkpointing.checkpoints import Checkpoints
from megatron_eso.training.guards.watchdog import Watchdog
from megatron_eso.training.records.log import log_once
from megatron_eso.training.records.run_records import RunRecords
from megatron_eso.training.steps.train_state import TrainState

RETRY_SECONDS = 60.0
"""Between a failed save that training does not wait for and the next one."""
SAVE_PAUSES_SECONDS = (5.0, 5.0)
"""Between the tries of a save that the run waits for."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Saves:
    """The saves of a run while it trains.

    Attributes:
        checkpoints: Where they are written.
        config: The run's; a checkpoint holds a copy, and the section checkpoint has the intervals.
        groups: Of the layout.
        records: Flushed before each save.
        watchdog: Watches the saves that hold up the steps.
    """

    checkpoints: Checkpoints
    config: Config
    groups: ProcessGroupCollection
    records: RunRecords
    watchdog: Watchdog
    _began_at: float = field(init=False, default_factory=time.monotonic)
    """When the last save began, by the monotonic clock; at first, when this was made."""
    _retry_at: float = field(init=False, default=math.inf)
    """When to save again what could not be saved, by the monotonic clock."""
    _is_writing: bool = field(init=False, default=False)
    """Whether the last save may still go on in the background."""
    _held_seconds: float = field(init=False, default=0.0)
    """How long saves have held up the steps since these times were taken."""
    _written_seconds: float | None = field(init=False, default=None)
    """What the last save took, if it was published since these times were taken."""

    def prepare(self, state: TrainState) -> None:
        """Take the host memory that saves in the background need, before the first step."""
        self.checkpoints.prepare(state, self.groups)

    def is_due_at(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`, by steps; the same on every rank."""
        interval = self.config.checkpoint.interval
        is_last = step == self.config.train.num_steps
        return is_last or (interval > 0 and step % interval == 0)

    def is_due_now(self) -> bool:
        """Whether a save is due by this rank's clock, or because the last one has failed.

        Clocks differ: all ranks save if it is due on one of them.
        """
        failure = self.checkpoints.take_failure()
        now = time.monotonic()
        if failure is not None:
            log_once(
                logger,
                logging.ERROR,
                f"{failure}; training goes on, trying again in {RETRY_SECONDS:.0f} s",
            )
            self._retry_at, self._written_seconds = now + RETRY_SECONDS, None
        interval = 60 * self.config.checkpoint.interval_minutes
        return now >= self._retry_at or 0 < interval <= now - self._began_at

    def save(self, state: TrainState, val_nelbo: float | None, *, wait: bool) -> None:
        """Write a checkpoint; collective over the world.

        Args:
            state: To be written.
            val_nelbo: Of the validation at this step, if there was one.
            wait: Return once it is published; else it may be written during the next steps.

        Raises:
            CheckpointError: It cannot be written, after several tries, and the run waits for it.
        """
        began = time.monotonic()
        self._began_at, self._retry_at = began, math.inf
        self.records.flush()
        in_background = self.config.checkpoint.async_save and not wait
        with self.watchdog.deadline("checkpoint", str(state.counters.step)):
            if wait:
                retry(
                    partial(self._write, state, val_nelbo, in_background=False),
                    errors=CheckpointError,
                    pauses=SAVE_PAUSES_SECONDS,
                    on_error=_log_failure,
                )
            else:
                try:
                    self._write(state, val_nelbo, in_background=in_background)
                except CheckpointError as error:
                    _log_failure(error)
                    self._retry_at = time.monotonic() + RETRY_SECONDS
        held = time.monotonic() - began
        self._held_seconds += held
        self._is_writing, self._written_seconds = in_background, None if in_background else held

    def note_end(self) -> None:
        """Note when a save in the background has ended; to be called after each step."""
        if self._is_writing and not self.checkpoints.is_saving:
            self._is_writing = False
            self._written_seconds = time.monotonic() - self._began_at

    def take_times(self) -> tuple[float, float | None]:
        """How long saves have held up the steps, and what the last one took from start to end.

        In seconds, since the last call; the second is None where none was published since.
        """
        times = self._held_seconds, self._written_seconds
        self._held_seconds, self._written_seconds = 0.0, None
        return times

    def _write(self, state: TrainState, val_nelbo: float | None, *, in_background: bool) -> None:
        path = self.checkpoints.save(
            state, self.config, self.groups, val_nelbo=val_nelbo, in_background=in_background
        )
        log_once(logger, logging.INFO, f"{'saving' if in_background else 'saved'} {path}")


def _log_failure(error: Exception, _pause_seconds: float = 0.0) -> None:
    log_once(logger, logging.ERROR, f"{error}; trying again")
