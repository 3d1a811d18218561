"""The training loop: steps, and the four things that happen between them."""

import logging
import resource
import time
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_eso.config import Config
from megatron_eso.data.batches import TrainingBatches
from megatron_eso.data.reader import TokenDataset
from megatron_eso.training.checkpoint import Checkpoints
from megatron_eso.training.evaluation import evaluate, validation_metrics
from megatron_eso.training.metrics import MetricsLog
from megatron_eso.training.run_directory import RunDirectory
from megatron_eso.training.step import StepResult, train_step
from megatron_eso.training.train_state import TrainState

GIBI = 2**30

# Dense bf16 peaks that the makers publish, FLOP/s, by a part of the device's name.
PUBLISHED_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """What the loop works with; built by `pretrain.train`.

    `metrics` is there on rank 0 only. `flops_per_token` is what the objective needs.
    """

    config: Config
    run: RunDirectory
    groups: ProcessGroupCollection
    state: TrainState
    batches: TrainingBatches
    validation: TokenDataset | None
    checkpoints: Checkpoints
    metrics: MetricsLog | None
    flops_per_token: float

    def train(self) -> None:
        """Train from where `state` stands to `train.num_steps`; collective over the world."""
        num_steps, state = self.config.train.num_steps, self.state
        first_step, started = state.counters.step, time.monotonic()
        if first_step == 0:
            self.validate()
        while state.counters.step < num_steps:
            began = time.monotonic()
            result = train_step(self.config, state, self.batches, self.groups, self.flops_per_token)
            now, step = time.monotonic(), state.counters.step
            at_end = step == num_steps
            if at_end or due(step, self.config.train.log_interval):
                per_step = (now - started) / (step - first_step)
                self.log_step(result, now - began, (num_steps - step) * per_step)
            if at_end or due(step, self.config.validation.interval):
                self.validate()
            if at_end or due(step, self.config.checkpoint.interval):
                self.save()

    def log_step(self, result: StepResult, seconds: float, seconds_left: float) -> None:
        """Record a step and show a line of progress; on rank 0."""
        if self.metrics is None:
            return
        counters, config = self.state.counters, self.config
        num_ranks = torch.distributed.get_world_size()
        tokens_per_second = config.train.global_batch_size * config.data.sequence_length / seconds
        values = {
            "train/loss": result.loss,
            "train/nelbo": result.nelbo,
            "train/loss_diffusion": result.loss_diffusion,
            "train/loss_sequential": result.loss_sequential,
            "train/grad_norm": result.grad_norm,
            "train/learning_rate": result.learning_rate,
            "train/skipped_steps": counters.skipped_steps,
            "perf/step_seconds": seconds,
            "perf/data_wait_seconds": result.data_seconds,
            "perf/tokens_per_second": tokens_per_second,
            "perf/tokens_per_second_per_gpu": tokens_per_second / num_ranks,
            "perf/memory_gib": used_memory_gib(),
            "progress/tokens": counters.tokens,
            "progress/flops": counters.flops,
        }
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
            "lr %.2e | %.0f tokens/s | ETA %s%s",
            counters.step,
            config.train.num_steps,
            result.loss,
            result.loss_diffusion,
            result.loss_sequential,
            result.grad_norm,
            result.learning_rate,
            tokens_per_second,
            format_seconds(seconds_left),
            " | SKIPPED: loss or gradient is not finite" if result.skipped else "",
        )

    def validate(self) -> None:
        """Estimate the NELBO of the validation set, with the average where there is one."""
        dataset, state = self.validation, self.state
        if dataset is None:
            return
        has_ema = state.ema is not None
        estimate = evaluate(self.config, state, dataset, self.groups, use_ema=has_ema)
        values = validation_metrics(estimate, "val")
        if has_ema:
            raw = evaluate(self.config, state, dataset, self.groups, use_ema=False)
            values |= validation_metrics(raw, "val_raw")
        if self.metrics is None:
            return
        self.metrics.log_validation(self.state.counters, values)
        logger.info(
            "step %d | validation NELBO %.4f +- %.4f nats per token, perplexity %.2f%s",
            self.state.counters.step,
            estimate.nelbo,
            estimate.standard_error,
            estimate.perplexity,
            " (EMA weights)" if has_ema else "",
        )

    def save(self) -> None:
        """Write a checkpoint; collective over the world."""
        if self.metrics is not None:
            self.metrics.flush()
        path = self.checkpoints.save(self.state, self.config, self.groups)
        logger.info("saved %s", path)


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
