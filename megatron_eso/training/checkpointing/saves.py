"""Decides when a run saves: by steps, by the clock, at its end, and again after a failed save."""

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
"""Seconds until a save that training does not wait for is tried again."""
SAVE_PAUSES_SECONDS = (5.0, 5.0)
"""Seconds between the tries of a save that training waits for."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Saves:
    """The saves of a run while it trains.

    Attributes:
        checkpoints: The run's checkpoints.
        config: The run's configuration: a checkpoint holds a copy, `checkpoint` has the intervals.
        groups: The groups of the layout.
        records: The run's records, which are flushed before each save.
        watchdog: Limits the time that a save may delay the steps.
    """

    checkpoints: Checkpoints
    config: Config
    groups: ProcessGroupCollection
    records: RunRecords
    watchdog: Watchdog
    _began_at: float = field(init=False, default_factory=time.monotonic)
    """When the last save began, by the monotonic clock; before the first save, the start."""
    _retry_at: float = field(init=False, default=math.inf)
    """When a failed save is tried again, by the monotonic clock."""
    _is_writing: bool = field(init=False, default=False)
    """Whether the last save may still be running in the background."""
    _held_seconds: float = field(init=False, default=0.0)
    """How long saves have delayed the steps since the last call of `take_times`."""
    _written_seconds: float | None = field(init=False, default=None)
    """How long the last save took, if it has ended since the last call of `take_times`."""

    def prepare(self, state: TrainState) -> None:
        """Allocate the host memory for saves in the background; call it before the first step."""
        self.checkpoints.prepare(state, self.groups)

    def is_due_at(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step`, by steps; equal on all ranks."""
        interval = self.config.checkpoint.interval
        is_last = step == self.config.train.num_steps
        return is_last or (interval > 0 and step % interval == 0)

    def is_due_now(self) -> bool:
        """Return whether a save is due by this rank's clock, or because the last one has failed.

        Clocks differ between ranks: all ranks save if a save is due on any of them.
        """
        failure = self.checkpoints.take_failure()
        now = time.monotonic()
        if failure is not None:
            log_once(
                logger,
                logging.ERROR,
                f"{failure}; training continues, trying again in {RETRY_SECONDS:.0f} s",
            )
            self._retry_at, self._written_seconds = now + RETRY_SECONDS, None
            self._is_writing = False
        interval = 60 * self.config.checkpoint.interval_minutes
        return now >= self._retry_at or 0 < interval <= now - self._began_at

    def save(self, state: TrainState, val_nelbo: float | None, *, wait: bool) -> None:
        """Write a checkpoint; collective over the world.

        Args:
            state: The state to write.
            val_nelbo: The NELBO of the validation at this step, in nats per token; None without
                one.
            wait: Return when the checkpoint is complete; else it may be written during the next
                steps.

        Raises:
            CheckpointError: With `wait`, the checkpoint could not be written after several tries.
        """
        # A save that is due by the clock is counted from here.
        began = time.monotonic()
        self._began_at, self._retry_at = began, math.inf
        self.records.flush()
        in_background = self.config.checkpoint.async_save and not wait
        # Without `wait`, a failed save is tried again later.
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
        """Note the time if a save in the background has ended; call it after each step."""
        if self._is_writing and not self.checkpoints.is_saving:
            self._is_writing = False
            self._written_seconds = time.monotonic() - self._began_at

    def take_times(self) -> tuple[float, float | None]:
        """Return the times of saves since the last call, in seconds.

        Returns:
            How long saves have delayed the steps, and how long the last save took from start to
            end; the second is None if no save has ended since the last call.
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
