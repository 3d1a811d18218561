"""The training loop: steps, and validations, saves and stops between them."""

import time
from dataclasses import dataclass, field

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_eso.config.sections import TrainConfig, ValidationConfig
from megatron_eso.training.checkpointing.rollbacks import Rollbacks
from megatron_eso.training.checkpointing.saves import Saves
from megatron_eso.training.distributed.parallel import max_over_world
from megatron_eso.training.guards.batch_check import check_batches
from megatron_eso.training.guards.stop import REASONS, StopRequests
from megatron_eso.training.guards.watchdog import Watchdog
from megatron_eso.training.records.curve_values import StepTimes
from megatron_eso.training.records.run_records import RunRecords
from megatron_eso.training.steps.batches import StepPlan, TrainingBatches, ValidationBatches
from megatron_eso.training.steps.evaluation import evaluate
from megatron_eso.training.steps.prefetch import StepPrefetcher
from megatron_eso.training.steps.step import train_step
from megatron_eso.training.steps.train_state import TrainState


@dataclass(slots=True)
class Validations:
    """The validations of a run: at its start, at its end, and at the interval.

    Attributes:
        train: Has the length of the run.
        validation: Has the interval.
        batches: The validation set; None: the run has no validation.
        groups: Groups of this rank.
        records: Receives the estimates.
        watchdog: Watches the validations.
    """

    train: TrainConfig
    validation: ValidationConfig
    batches: ValidationBatches | None
    groups: ProcessGroupCollection
    records: RunRecords
    watchdog: Watchdog
    _last_step: int = field(init=False, default=-1)
    """The last step that was validated."""

    def prepare(self) -> None:
        """Read on all ranks which step was validated last; collective over the world."""
        (self._last_step,) = max_over_world(self.records.validated_step)

    def validate_if_due(self, state: TrainState) -> float | None:
        """Estimate the NELBO of the validation set, if that is due; collective over the world.

        A validation that an interrupted job did not make is due as well.

        Returns:
            The NELBO, with the EMA weights if the run has them; None if no validation is due.
        """
        step = state.counters.step
        is_due = step in (0, self.train.num_steps)
        is_due |= is_multiple(step, self.validation.interval)
        if self.batches is None or not is_due or self._last_step >= step:
            return None
        raw = None
        has_ema = state.ema is not None
        with self.watchdog.deadline("validation", str(step)):
            estimate = evaluate(state, self.batches, self.groups, use_ema=has_ema)
            if has_ema and self.validation.raw_weights:
                raw = evaluate(state, self.batches, self.groups, use_ema=False)
        self._last_step = step
        self.records.record_validation(estimate, raw, state.counters, has_ema=has_ema)
        return estimate.nelbo

    def rewind(self, step: int) -> None:
        """Repeat the validations after `step`, to which the run has gone back."""
        self._last_step = min(self._last_step, step)


@dataclass(kw_only=True, slots=True)
class Trainer:
    """A run on this rank with its training loop; `training/job.py` builds it.

    Attributes:
        train_config: Has length and batch of the run, and the limits of its updates.
        batch_check_interval: Steps between checks that the ranks hold the same batch; 0: never.
        dropout_seed: The run's seed; None: no dropout.
        state: The training state, which the steps change.
        groups: Groups of this rank.
        batches: The samples of each step.
        prefetcher: Plans batches ahead.
        records: Curves, status and log.
        validations: Estimates the NELBO.
        saves: Writes checkpoints.
        rollbacks: Goes back to a checkpoint.
        stop: Requests to end before the last step.
        watchdog: Ends the job when a rank hangs.
    """

    train_config: TrainConfig
    batch_check_interval: int
    dropout_seed: int | None
    state: TrainState
    groups: ProcessGroupCollection
    batches: TrainingBatches
    prefetcher: StepPrefetcher
    records: RunRecords
    validations: Validations
    saves: Saves
    rollbacks: Rollbacks
    stop: StopRequests
    watchdog: Watchdog
    _requests: tuple[int, ...] = field(init=False, default=(0, 0))
    """The reason to stop and whether a save is due, as any rank stated in the last step."""

    def train(self) -> str | None:
        """Train from the step of `state` to `train.num_steps`; collective over the world.

        Returns:
            Why the run stopped before its last step; None at the last step.

        Raises:
            TrainingError: Updates cannot be applied, after going back as well.
            CheckpointError: The last checkpoint could not be written.
        """
        state, num_steps = self.state, self.train_config.num_steps
        first_step, started = state.counters.step, time.monotonic()
        with self.watchdog.deadline("start", "of the loop"):
            self.validations.prepare()
            self.saves.prepare(state)
        self.validations.validate_if_due(state)
        while state.counters.step < num_steps:
            self.take_step(first_step, started)
            if self.rollbacks.is_due(state.counters):
                self.rollbacks.go_back(state)
                self.validations.rewind(state.counters.step)
                self.records.rewind(state.counters)
                continue
            # Any rank may have received a request to stop, or find that a save is due.
            step, (request, is_save_due) = state.counters.step, self._requests
            if request and step < num_steps:
                # The time may be too short for a validation that is due: the next job makes it.
                self.saves.save(state, None, wait=True)
                return REASONS[request]
            val_nelbo = self.validations.validate_if_due(state)
            if is_save_due or self.saves.is_due_at(step):
                self.saves.save(state, val_nelbo, wait=step == num_steps)
        return None

    def take_step(self, first_step: int, started: float) -> None:
        """Take a step and record it; collective over the world.

        Args:
            first_step: Number of steps before this job.
            started: When this job's first step began, by the monotonic clock.
        """
        # The step, within its deadline.
        began, before = time.monotonic(), self.state.counters
        is_first = before.step == first_step
        work = "first step" if is_first else "train step"
        with self.watchdog.deadline(work, str(before.step + 1)):
            plan = self.prefetcher.take(self.batches.step(before.step, before.consumed_samples))
            data_seconds = time.monotonic() - began
            self.check_batches(plan, is_first=is_first)
            self.records.timer.begin()
            result = train_step(
                self.state,
                plan,
                self.batches.objective,
                self.train_config,
                self.groups,
                flops_per_token=self.records.flops_per_token,
                dropout_seed=self.dropout_seed,
                read_requests=lambda: (self.stop.received(), self.saves.is_due_now()),
            )
        self._requests = result.requests
        # Its records.
        now, counters, train = time.monotonic(), self.state.counters, self.train_config
        self.records.record_oddity(result, before, counters)
        self.saves.note_end()
        is_last = counters.step == train.num_steps
        if is_last or is_multiple(counters.step, train.log_interval):
            held_seconds, written_seconds = self.saves.take_times()
            times = StepTimes(
                step=now - began,
                data=data_seconds,
                held=held_seconds,
                written=written_seconds,
                left=self.estimate_seconds_left(first_step, now - started),
            )
            self.records.record_step(result, counters, times)

    def check_batches(self, plan: StepPlan, *, is_first: bool) -> None:
        """Compare the batches within each copy of the model at the interval; collective."""
        step, interval = self.state.counters.step, self.batch_check_interval
        if interval > 0 and (is_first or is_multiple(step, interval)):
            check_batches(step, plan.micro_batches, self.groups)

    def estimate_seconds_left(self, first_step: int, seconds: float) -> float:
        """Estimate the seconds until the last step, at the mean speed of this job.

        Args:
            first_step: Number of steps before this job.
            seconds: Time that this job's steps took.
        """
        step = self.state.counters.step
        # After going back to a checkpoint, the difference can be zero or negative.
        return (self.train_config.num_steps - step) * seconds / max(step - first_step, 1)


def is_multiple(step: int, interval: int) -> bool:
    """Return whether something due every `interval` steps (0: never) is due after `step`."""
    return interval > 0 and step % interval == 0
