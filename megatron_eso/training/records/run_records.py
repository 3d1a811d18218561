"""Writes the records of a run: curves, status, lines of the log."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from megatron_eso.batches.loss import NelboEstimate
from megatron_eso.config.sections import TrainConfig
from megatron_eso.data.samples.training_data import TrainingData
from megatron_eso.runs.counters import Counters
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.training.guards.stragglers import WorkTimer, find_straggler
from megatron_eso.training.guards.watchdog import Watchdog
from megatron_eso.training.records import tags
from megatron_eso.training.records.curve_values import (
    StepTimes,
    list_step_values,
    list_validation_values,
)
from megatron_eso.training.records.log import log_once
from megatron_eso.training.records.log_lines import (
    describe_oddity,
    describe_step,
    describe_validation,
)
from megatron_eso.training.records.metrics import MetricsLog
from megatron_eso.training.records.status_writer import StatusWriter
from megatron_eso.training.steps.step import StepResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecords:
    """The records of a run on this rank; only those of rank 0 write.

    Attributes:
        run: The run's directory.
        metrics: The curves; None on the ranks that do not write.
        train: Has length, batch and log interval of the run.
        data: The training shards, which count the shares of a blend.
        timer: Times this rank's steps.
        hosts: The host of every rank.
        flops_per_token: FLOPs that the objective needs per token.
        watchdog: Watches the comparison of the ranks.
        status_writer: Writes the status of the running run.
    """

    run: RunDirectory
    metrics: MetricsLog | None
    train: TrainConfig
    data: TrainingData
    timer: WorkTimer
    hosts: Sequence[str]
    flops_per_token: float
    watchdog: Watchdog
    status_writer: StatusWriter = field(default_factory=StatusWriter)

    @property
    def validated_step(self) -> int:
        """The step of the last recorded validation; -1 without one, and on other ranks than 0."""
        return -1 if self.metrics is None else self.metrics.validated_step

    def record_step(self, result: StepResult, counters: Counters, times: StepTimes) -> None:
        """Record a step and log a line of progress; collective over the world."""
        with self.watchdog.deadline("train step", f"{counters.step}, its record"):
            straggler = find_straggler(self.timer.take_mean(), self.hosts)
        if self.metrics is None:
            return
        values = list_step_values(result, counters, times, straggler, self.flops_per_token)
        values |= {tags.RESTARTS: self.run.facts.restarts or 0} | self._list_shares(counters)
        self.metrics.log(counters, values)
        self.status_writer.start(
            partial(
                self.run.write_status,
                "running",
                counters.step,
                loss=result.loss,
                tokens_per_second=values[tags.TOKENS_PER_SECOND],
                seconds_left=times.left,
            )
        )
        line = describe_step(result, counters, self.train.num_steps, times, straggler)
        log_once(logger, logging.INFO, line)

    def record_oddity(self, result: StepResult, before: Counters, after: Counters) -> None:
        """Log a step that was skipped or flagged."""
        oddity = describe_oddity(result, before, after, self.hosts)
        if oddity is not None:
            log_once(logger, logging.WARNING, oddity)

    def record_validation(
        self,
        estimate: NelboEstimate,
        raw: NelboEstimate | None,
        counters: Counters,
        *,
        has_ema: bool,
    ) -> None:
        """Record a validation and log a line.

        Args:
            estimate: The estimate with EMA weights, or with raw weights if the run has no EMA.
            raw: The second estimate of a run with EMA, with raw weights; None: there is none.
            counters: The progress of the run.
            has_ema: Whether the run has EMA.
        """
        values = list_validation_values(estimate)
        if raw is not None:
            of_raw = list_validation_values(raw)
            values |= {tags.with_raw_weights(tag): value for tag, value in of_raw.items()}
        if self.metrics is not None:
            self.metrics.log_validation(counters, values)
        line = describe_validation(counters.step, estimate, has_ema=has_ema)
        log_once(logger, logging.INFO, line)

    def flush(self) -> None:
        """Write everything to disk: a checkpoint must not be newer than the records before it."""
        if self.metrics is not None:
            self.metrics.flush()

    def rewind(self, counters: Counters) -> None:
        """Remove the records after `counters.step`, to which the run has gone back."""
        if self.metrics is not None:
            self.metrics.rewind(counters)

    def _list_shares(self, counters: Counters) -> dict[str, float]:
        """Return the share of each corpus of a blend in the samples since the last record."""
        if len(self.data.datasets) == 1:
            return {}
        stop = counters.consumed_samples
        start = max(0, stop - self.train.log_interval * self.train.global_batch_size)
        shares = self.data.count_shares(start, stop)
        return {tags.share_of_corpus(name): share for name, share in shares.items()}
