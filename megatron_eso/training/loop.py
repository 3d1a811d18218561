"""The training loop: steps, and what happens between them."""

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_eso.config.sections import Config
from megatron_eso.errors import CheckpointError, TrainingError
from megatron_eso.objectives.objective import Objective
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.training.batches import StepPlan, TrainingBatches, ValidationBatches
from megatron_eso.training.checkpointing.checkpoints import Checkpoints
from megatron_eso.training.checkpointing.state import load_training_state
from megatron_eso.training.evaluation import evaluate, validation_metrics
from megatron_eso.training.guards.batch_check import check_batches
from megatron_eso.training.guards.stop import REASONS, StopRequests
from megatron_eso.training.guards.stragglers import WorkTimer, find_straggler
from megatron_eso.training.guards.watchdog import Watchdog
from megatron_eso.training.optimizer import build_scheduler
from megatron_eso.training.parallel import max_over_world
from megatron_eso.training.prefetch import StepPrefetcher
from megatron_eso.training.records.metrics import MetricsLog
from megatron_eso.training.records.step_record import (
    StepTimes,
    describe_oddity,
    describe_step,
    list_values,
)
from megatron_eso.training.step import StepResult, train_step
from megatron_eso.training.train_state import TrainState

RETRY_SECONDS = 60.0
"""Until a save that has failed is tried again."""
SAVE_TRIES = 3
"""Of a save that the run waits for."""
SAVE_TRY_SECONDS = 5.0

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Trainer:
    """What the loop works with; built by `pretrain.train`.

    `metrics` is there on rank 0 only. `flops_per_token` is what the objective needs, `dropout_seed`
    is None without dropout. `hosts` are those of all ranks.
    """

    config: Config
    run: RunDirectory
    groups: ProcessGroupCollection
    state: TrainState
    objective: Objective
    batches: TrainingBatches
    prefetcher: StepPrefetcher
    validation: ValidationBatches | None
    checkpoints: Checkpoints
    metrics: MetricsLog | None
    watchdog: Watchdog
    stop: StopRequests
    timer: WorkTimer
    hosts: Sequence[str]
    flops_per_token: float
    dropout_seed: int | None
    saved_at: float = field(default_factory=time.monotonic)
    """When the last save began, by the monotonic clock."""
    is_writing: bool = False
    """Whether a save may still be going on in the background."""
    retry_at: float = math.inf
    """When to save again what could not be saved."""
    held_seconds: float = 0.0
    """How long saves have held up the steps since the last line of the log."""
    written_seconds: float | None = None
    """What the last save took, if it was published since the last line of the log."""
    validated_step: int = -1
    """Last step that was validated."""
    went_back_to: int | None = None
    """Step of the checkpoint that the run has gone back to last."""

    def train(self) -> str | None:
        """Train from where `state` stands to `train.num_steps`; collective over the world.

        Returns:
            Why the run was asked to stop before; None at its end.

        Raises:
            TrainingError: Updates cannot be applied, and going back has not helped.
            CheckpointError: The last checkpoint could not be written.
        """
        config, state = self.config, self.state
        first_step, started = state.counters.step, time.monotonic()
        recorded = -1 if self.metrics is None else self.metrics.validated_step
        with self.watchdog.phase("start", "of the loop"):
            (self.validated_step,) = max_over_world(recorded)
            self.checkpoints.prepare(state, self.groups)
        self.validate_if_due()
        while state.counters.step < config.train.num_steps:
            self.take_step(first_step, started)
            if 0 < config.train.max_skipped_in_row <= state.counters.skipped_in_row:
                self.roll_back()
                continue
            step = state.counters.step
            at_end = step == config.train.num_steps
            with self.watchdog.phase("train step", f"{step}, its end"):
                heard, wants_save = max_over_world(self.stop.heard(), self.wants_save())
            if heard and not at_end:
                # There may be no time for a validation that is due: the next job sees to it.
                self.save(None, wait=True)
                return REASONS[heard]
            val_nelbo = self.validate_if_due()
            if at_end or wants_save or due(step, config.checkpoint.interval):
                self.save(val_nelbo, wait=at_end)
        return None

    def take_step(self, first_step: int, started: float) -> None:
        """Take a step and record it; collective over the world.

        Args:
            first_step: Steps that were taken before this job.
            started: When this job's first step began, by the monotonic clock.
        """
        began, before = time.monotonic(), self.state.counters
        is_first = before.step == first_step
        with self.watchdog.phase("first step" if is_first else "train step", str(before.step + 1)):
            plan = self.prefetcher.take(self.batches.step(before.step, before.consumed_samples))
            data_seconds = time.monotonic() - began
            self.check_batches(plan, is_first=is_first)
            self.timer.begin()
            result = train_step(
                self.state,
                plan,
                self.objective,
                self.config.train,
                self.groups,
                flops_per_token=self.flops_per_token,
                dropout_seed=self.dropout_seed,
            )
        now, step = time.monotonic(), self.state.counters.step
        oddity = describe_oddity(result, before, self.state.counters, self.hosts)
        if oddity is not None:
            self.tell(logging.WARNING, oddity)
        num_steps = self.config.train.num_steps
        if self.is_writing and not self.checkpoints.is_saving:
            self.is_writing, self.written_seconds = False, now - self.saved_at
        if step == num_steps or due(step, self.config.train.log_interval):
            times = StepTimes(
                step=now - began,
                data=data_seconds,
                held=self.held_seconds,
                written=self.written_seconds,
                # After going back, fewer steps may have been gained than taken.
                left=(num_steps - step) * (now - started) / max(step - first_step, 1),
            )
            self.held_seconds, self.written_seconds = 0.0, None
            self.log_step(result, times)

    def check_batches(self, plan: StepPlan, *, is_first: bool) -> None:
        """Compare the batches within each copy of the model, now and then; collective."""
        step, interval = self.state.counters.step, self.config.data.batch_check_interval
        if interval > 0 and (is_first or due(step, interval)):
            check_batches(step, plan.micro_batches, self.groups)

    def log_step(self, result: StepResult, times: StepTimes) -> None:
        """Record a step and show a line of progress; collective over the world."""
        counters, num_steps = self.state.counters, self.config.train.num_steps
        with self.watchdog.phase("train step", f"{counters.step}, its record"):
            straggler = find_straggler(self.timer.take_mean(), self.hosts)
        if self.metrics is None:
            return
        values = list_values(result, counters, times, straggler, self.flops_per_token)
        values |= {"perf/restarts": self.run.facts.restarts or 0} | self.list_shares()
        self.metrics.log(counters, values)
        self.run.write_status(
            "running",
            counters.step,
            loss=result.loss,
            tokens_per_second=values["perf/tokens_per_second"],
            seconds_left=times.left,
        )
        self.tell(logging.INFO, describe_step(result, counters, num_steps, times, straggler))

    def list_shares(self) -> dict[str, float]:
        """Share of each corpus of a blend in the samples since the record before, by tag."""
        train, counters = self.config.train, self.state.counters
        if len(self.config.data.train_corpora) == 1:
            return {}
        stop = counters.consumed_samples
        start = max(0, stop - train.log_interval * train.global_batch_size)
        shares = self.batches.data.count_shares(start, stop)
        return {f"data/share/{name}": share for name, share in shares.items()}

    def validate_if_due(self) -> float | None:
        """Estimate the NELBO of the validation set, if it is time; with the average, if there is.

        At the start, at the end, and at the interval; what an interrupted job owes as well.
        Collective over the world.
        """
        batches, state, step = self.validation, self.state, self.state.counters.step
        is_due = step in (0, self.config.train.num_steps)
        is_due |= due(step, self.config.validation.interval)
        if batches is None or not is_due or self.validated_step >= step:
            return None
        has_ema = state.ema is not None
        with self.watchdog.phase("validation", str(step)):
            estimate = evaluate(state, batches, self.groups, use_ema=has_ema)
            values = validation_metrics(estimate, "val")
            if has_ema:
                raw = evaluate(state, batches, self.groups, use_ema=False)
                values |= validation_metrics(raw, "val_raw")
        self.validated_step = step
        if self.metrics is not None:
            self.metrics.log_validation(state.counters, values)
        self.tell(
            logging.INFO,
            f"step {step} | validation NELBO {estimate.nelbo:.4f} +- "
            f"{estimate.standard_error:.4f} nats per token, perplexity {estimate.perplexity:.2f}"
            f"{' (EMA weights)' if has_ema else ''}",
        )
        return estimate.nelbo

    def wants_save(self) -> bool:
        """Whether the clock asks for a save, or one that has failed is to be tried again."""
        failure = self.checkpoints.take_failure()
        now = time.monotonic()
        if failure is not None:
            self.tell(
                logging.ERROR,
                f"{failure}; training goes on, trying again in {RETRY_SECONDS:.0f} s",
            )
            self.retry_at, self.written_seconds = now + RETRY_SECONDS, None
        interval = 60 * self.config.checkpoint.interval_minutes
        return now >= self.retry_at or 0 < interval <= now - self.saved_at

    def save(self, val_nelbo: float | None, *, wait: bool) -> None:
        """Write a checkpoint; collective over the world.

        Args:
            val_nelbo: Of the validation at this step, if there was one.
            wait: Return once it is published; else it may be written beside the next steps.

        Raises:
            CheckpointError: It cannot be written, after several tries, and the run waits for it.
        """
        began = time.monotonic()
        self.saved_at, self.retry_at = began, math.inf
        if self.metrics is not None:
            self.metrics.flush()
        in_background = self.config.checkpoint.async_save and not wait
        with self.watchdog.phase("checkpoint", str(self.state.counters.step)):
            for tries_left in reversed(range(SAVE_TRIES if wait else 1)):
                try:
                    path = self.checkpoints.save(
                        self.state,
                        self.config,
                        self.groups,
                        val_nelbo=val_nelbo,
                        in_background=in_background,
                    )
                except CheckpointError as error:
                    if wait and not tries_left:
                        raise
                    self.tell(logging.ERROR, f"{error}; trying again")
                    self.retry_at = time.monotonic() + RETRY_SECONDS
                    if wait:
                        time.sleep(SAVE_TRY_SECONDS)
                else:
                    self.tell(logging.INFO, f"{'saving' if in_background else 'saved'} {path}")
                    break
        held = time.monotonic() - began
        self.held_seconds += held
        self.is_writing, self.written_seconds = in_background, None if in_background else held

    def roll_back(self) -> None:
        """Go back to a sound checkpoint and on with later samples; collective.

        To the newest one from before the updates that could not be applied; to one before it if
        that is where the run has just come from.

        Raises:
            TrainingError: There is none, or the run has gone back often enough.
        """
        counters, config = self.state.counters, self.config
        what = f"{counters.skipped_in_row} updates in a row could not be applied"
        if counters.rollbacks >= config.train.max_rollbacks:
            raise TrainingError(
                f"step {counters.step}: {what}, after going back {counters.rollbacks} times "
                f"(train.max_rollbacks): look at the losses before, lower "
                f"optimizer.learning_rate, or start from an older checkpoint"
            )
        last_applied = counters.step - counters.skipped_in_row
        with self.watchdog.phase("checkpoint", "to go back to"):
            checkpoint = None
            if self.went_back_to == last_applied:
                checkpoint = self.checkpoints.find_good(last_applied - 1)
            checkpoint = checkpoint or self.checkpoints.find_good(last_applied)
            if checkpoint is None:
                raise TrainingError(
                    f"step {counters.step}: {what}, and there is no checkpoint to go back to: "
                    f"lower optimizer.learning_rate, or look at the losses before"
                )
            load_training_state(checkpoint, self.state)
            self.state.scheduler = build_scheduler(config, self.state.optimizer)
            self.state.scheduler.step(self.state.counters.step)
            restored = self.state.counters
        self.went_back_to = restored.step
        self.validated_step = min(self.validated_step, restored.step)
        self.state.counters = dataclasses.replace(
            restored,
            consumed_samples=counters.consumed_samples,
            rollbacks=counters.rollbacks + 1,
            skipped_in_row=0,
        )
        if self.metrics is not None:
            self.metrics.rewind(self.state.counters)
        self.tell(
            logging.WARNING,
            f"{what}: went back from step {counters.step} to {checkpoint.name}; samples "
            f"{restored.consumed_samples} to {counters.consumed_samples - 1} are left out",
        )

    def tell(self, level: int, message: str) -> None:
        """Log on rank 0 what all ranks know."""
        if self.metrics is not None:
            logger.log(level, "%s", message)


def due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps (never, at 0) happens after `step`."""
    return interval > 0 and step % interval == 0
