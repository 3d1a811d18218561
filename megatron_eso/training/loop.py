"""The training loop: steps, and the four things that happen between them."""

import dataclasses
import logging
import math
import resource
import time
from dataclasses import dataclass, field

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_eso.config import Config
from megatron_eso.data.batches import StepPlan
from megatron_eso.data.reader import TokenDataset
from megatron_eso.errors import CheckpointError, TrainingError
from megatron_eso.training.batch_check import check_batches
from megatron_eso.training.checkpoint import Checkpoints
from megatron_eso.training.checkpoint_state import load_training_state
from megatron_eso.training.evaluation import evaluate, validation_metrics
from megatron_eso.training.metrics import MetricsLog
from megatron_eso.training.optimizer import build_scheduler
from megatron_eso.training.parallel import max_over_world
from megatron_eso.training.prefetch import StepPrefetcher
from megatron_eso.training.run_directory import RunDirectory
from megatron_eso.training.step import StepResult, train_step
from megatron_eso.training.stop import REASONS, StopRequests
from megatron_eso.training.train_state import TrainState
from megatron_eso.training.watchdog import Watchdog

GIBI = 2**30
RETRY_SECONDS = 60.0
"""Until a save that has failed is tried again."""
SAVE_TRIES = 3
"""Of a save that the run waits for."""
SAVE_TRY_SECONDS = 5.0

# Dense bf16 peaks that the makers publish, FLOP/s, by a part of the device's name.
PUBLISHED_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Trainer:
    """What the loop works with; built by `pretrain.train`.

    `metrics` is there on rank 0 only. `flops_per_token` is what the objective needs.
    """

    config: Config
    run: RunDirectory
    groups: ProcessGroupCollection
    state: TrainState
    prefetcher: StepPrefetcher
    validation: TokenDataset | None
    checkpoints: Checkpoints
    metrics: MetricsLog | None
    watchdog: Watchdog
    stop: StopRequests
    flops_per_token: float
    saved_at: float = field(default_factory=time.monotonic)
    """When the last save began, by the monotonic clock."""
    retry_at: float = math.inf
    """When to save again what could not be saved; on rank 0."""
    held_seconds: float = 0.0
    """How long saves have held up the steps since the last line of the log."""

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
        if config.checkpoint.async_save:
            self.checkpoints.prepare(state, self.groups)
        if first_step == 0:
            self.validate()
        while state.counters.step < config.train.num_steps:
            self.take_step(first_step, started)
            step = state.counters.step
            at_end = step == config.train.num_steps
            heard, wants_save = max_over_world(self.stop.heard(), self.wants_save())
            if heard and not at_end:
                # First the checkpoint: there may not be time for more.
                self.save(None, wait=True)
            val_nelbo = None
            if at_end or due(step, config.validation.interval):
                val_nelbo = self.validate()
            if heard and not at_end:
                return REASONS[heard]
            if at_end or wants_save or due(step, config.checkpoint.interval):
                self.save(val_nelbo, wait=at_end)
            if 0 < config.train.max_skipped_in_row <= state.counters.skipped_in_row:
                self.roll_back()
        return None

    def take_step(self, first_step: int, started: float) -> None:
        """Take a step and record it; collective over the world.

        Args:
            first_step: Steps that were taken before this job.
            started: When this job's first step began, by the monotonic clock.
        """
        began, before = time.monotonic(), self.state.counters
        with self.watchdog.phase("train step", str(before.step + 1)):
            plan = self.prefetcher.take(before.consumed_samples)
            data_seconds = time.monotonic() - began
            self.check_batches(plan, is_first=before.step == first_step)
            result = train_step(self.config, self.state, plan, self.groups, self.flops_per_token)
        now, step = time.monotonic(), self.state.counters.step
        if result.skipped or self.state.counters.spikes > before.spikes:
            logger.warning(
                "step %d, samples %d to %d: %s: loss %.4f (diffusion %.4f, sequential %.4f), "
                "grad norm %.3f, %.1f deviations above the steps before%s",
                step,
                before.consumed_samples,
                self.state.counters.consumed_samples - 1,
                "UPDATE LEFT OUT" if result.skipped else "spike",
                result.loss,
                result.loss_diffusion,
                result.loss_sequential,
                result.grad_norm,
                result.deviations,
                f"; {self.state.counters.skipped_in_row} left out in a row"
                if result.skipped
                else "",
            )
        num_steps = self.config.train.num_steps
        if step == num_steps or due(step, self.config.train.log_interval):
            # After going back, fewer steps may have been gained than taken.
            seconds_left = (num_steps - step) * (now - started) / max(step - first_step, 1)
            self.log_step(result, now - began, data_seconds, seconds_left)

    def check_batches(self, plan: StepPlan, *, is_first: bool) -> None:
        """Compare the batches within each copy of the model, now and then; collective."""
        step, interval = self.state.counters.step, self.config.data.batch_check_interval
        if interval > 0 and (is_first or due(step, interval)):
            check_batches(step, plan.micro_batches, self.groups)

    def log_step(
        self, result: StepResult, seconds: float, data_seconds: float, seconds_left: float
    ) -> None:
        """Record a step and show a line of progress; on rank 0.

        Args:
            result: What the step says of itself.
            seconds: Of the whole step.
            data_seconds: Of these, waited for data by this rank.
            seconds_left: Until the last step.
        """
        if self.metrics is None:
            return
        counters, config = self.state.counters, self.config
        num_ranks = torch.distributed.get_world_size()
        tokens_per_second = result.num_tokens / seconds
        values = {
            "train/loss": result.loss,
            "train/nelbo": result.nelbo,
            "train/loss_diffusion": result.loss_diffusion,
            "train/loss_sequential": result.loss_sequential,
            "train/grad_norm": result.grad_norm,
            "train/learning_rate": result.learning_rate,
            "train/skipped_steps": counters.skipped_steps,
            "train/spikes": counters.spikes,
            "train/rollbacks": counters.rollbacks,
            "perf/step_seconds": seconds,
            "perf/data_wait_seconds": data_seconds,
            "perf/tokens_per_second": tokens_per_second,
            "perf/tokens_per_second_per_gpu": tokens_per_second / num_ranks,
            "perf/memory_gib": used_memory_gib(),
            "perf/checkpoint_seconds": self.held_seconds,
            "progress/tokens": counters.tokens,
            "progress/flops": counters.flops,
        }
        self.held_seconds = 0.0
        peak = published_peak()
        if peak:
            flops_per_second = tokens_per_second / num_ranks * self.flops_per_token
            values["perf/mfu"] = flops_per_second / peak
        self.metrics.log(counters, values)
        self.run.write_status(
            "running",
            counters.step,
            num_steps=config.train.num_steps,
            loss=result.loss,
            tokens_per_second=tokens_per_second,
            seconds_left=seconds_left,
        )
        logger.info(
            "step %d/%d | loss %.4f (diffusion %.4f, sequential %.4f) | grad norm %.3f | "
            "lr %.2e | %.0f tokens/s | ETA %s",
            counters.step,
            config.train.num_steps,
            result.loss,
            result.loss_diffusion,
            result.loss_sequential,
            result.grad_norm,
            result.learning_rate,
            tokens_per_second,
            format_seconds(seconds_left),
        )

    def validate(self) -> float | None:
        """Estimate the NELBO of the validation set; with the average, where there is one."""
        dataset, state = self.validation, self.state
        if dataset is None:
            return None
        has_ema = state.ema is not None
        with self.watchdog.phase("validation", str(state.counters.step)):
            estimate = evaluate(self.config, state, dataset, self.groups, use_ema=has_ema)
            values = validation_metrics(estimate, "val")
            if has_ema:
                raw = evaluate(self.config, state, dataset, self.groups, use_ema=False)
                values |= validation_metrics(raw, "val_raw")
        if self.metrics is None:
            return estimate.nelbo
        self.metrics.log_validation(self.state.counters, values)
        logger.info(
            "step %d | validation NELBO %.4f +- %.4f nats per token, perplexity %.2f%s",
            self.state.counters.step,
            estimate.nelbo,
            estimate.standard_error,
            estimate.perplexity,
            " (EMA weights)" if has_ema else "",
        )
        return estimate.nelbo

    def wants_save(self) -> bool:
        """Whether the clock asks for a save, or one that has failed is to be tried again."""
        failure = self.checkpoints.take_failure()
        now = time.monotonic()
        if failure is not None:
            logger.error("%s; training goes on, trying again in %.0f s", failure, RETRY_SECONDS)
            self.retry_at = now + RETRY_SECONDS
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
                    logger.error("%s; trying again", error)
                    self.retry_at = time.monotonic() + RETRY_SECONDS
                    if wait:
                        time.sleep(SAVE_TRY_SECONDS)
                else:
                    logger.info("%s %s", "saving" if in_background else "saved", path)
                    break
        self.held_seconds += time.monotonic() - began

    def roll_back(self) -> None:
        """Go back to the newest sound checkpoint and on with later samples; collective.

        Raises:
            TrainingError: There is none, or the run has gone back often enough.
        """
        counters, config = self.state.counters, self.config
        self.checkpoints.wait()
        what = f"{counters.skipped_in_row} updates in a row could not be applied"
        if counters.rollbacks >= config.train.max_rollbacks:
            raise TrainingError(
                f"step {counters.step}: {what}, after going back {counters.rollbacks} times "
                f"(train.max_rollbacks): look at the losses before, lower "
                f"optimizer.learning_rate, or start from an older checkpoint"
            )
        checkpoint = self.checkpoints.find_valid()
        if checkpoint is None:
            raise TrainingError(
                f"step {counters.step}: {what}, and there is no checkpoint to go back to: lower "
                f"optimizer.learning_rate, or look at the losses before"
            )
        load_training_state(checkpoint, self.state)
        self.state.scheduler = build_scheduler(config, self.state.optimizer)
        self.state.scheduler.step(self.state.counters.step)
        first_left_out = self.state.counters.consumed_samples
        self.state.counters = dataclasses.replace(
            self.state.counters,
            consumed_samples=counters.consumed_samples,
            rollbacks=counters.rollbacks + 1,
            skipped_in_row=0,
        )
        if self.metrics is not None:
            self.metrics.rewind(self.state.counters)
        logger.warning(
            "%s: went back from step %d to %s; samples %d to %d are left out",
            what,
            counters.step,
            checkpoint.name,
            first_left_out,
            counters.consumed_samples - 1,
        )


def due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps (never, at 0) happens after `step`."""
    return interval > 0 and step % interval == 0


def used_memory_gib() -> float:
    """Most memory that this process held: of its GPU, or of the machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIBI
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIBI


def published_peak() -> float | None:
    """Dense bf16 FLOP/s of this rank's GPU as published, none where it is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PUBLISHED_PEAKS.items() if part in name), None)


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
