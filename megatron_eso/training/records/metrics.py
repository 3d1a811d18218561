"""Writes the curves of a run to metrics.jsonl and TensorBoard, under the same tags."""

import json
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter

from megatron_eso.files import write_text
from megatron_eso.runs.counters import Counters
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.training.records import tags
from megatron_eso.training.records.wandb_log import WandbLog

GIGA = 1e9

logger = logging.getLogger(__name__)


class MetricsLog:
    """The curves of a run, continued from a step as without an interruption.

    Entries after `counters.step`, which a killed job left, are removed. The two curves with another
    axis are separate TensorBoard runs, since TensorBoard purges by step.

    If the file system refuses a write, training continues. The values since the last flush stay in
    memory. The next flush opens the files again, as a resumed run does, and repeats the writes.

    Args:
        run: The run's directory.
        counters: The progress of the run.
        wandb: Receives the same values; closed with the files.

    Attributes:
        validated_step: Step of the last recorded validation; -1 without one.
    """

    def __init__(
        self, run: RunDirectory, counters: Counters, wandb: WandbLog | None = None
    ) -> None:
        self._run = run
        self._wandb = wandb
        self.validated_step = -1
        self._last = self._flushed = counters
        self._since: list[Callable[[], None]] = []
        self._failure: OSError | None = None
        self._open(counters)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.flush()
        self._close()
        if self._wandb is not None:
            self._wandb.close()

    def rewind(self, counters: Counters) -> None:
        """Remove the records after `counters.step`, to which the run has gone back."""
        self._since.clear()
        self._last = self._flushed = counters
        self._try(self._reopen)

    def _reopen(self) -> None:
        self._close()
        self._open(self._flushed)
        for write in self._since:
            write()

    def _open(self, counters: Counters) -> None:
        run = self._run
        kept = keep_lines(run.metrics, counters.step)
        self.validated_step = max(
            (line["step"] for line in kept if tags.VAL_NELBO in line), default=-1
        )
        self._lines = run.metrics.open("a", buffering=1)
        self._steps = open_writer(run.tensorboard, counters.step)
        self._flops = open_writer(run.tensorboard / "scaling_by_flops", _gigaflops(counters))
        self._tokens = open_writer(run.tensorboard / "scaling_by_tokens", counters.tokens)

    def _close(self) -> None:
        for stream in (self._lines, self._steps, self._flops, self._tokens):
            with suppress(OSError):  # an earlier write has failed
                stream.close()

    def log_texts(self, counters: Counters, texts: dict[str, str]) -> None:
        """Show texts by name in TensorBoard's text tab at this step."""
        for name, text in texts.items():
            indented = "\n".join(f"    {line}" for line in text.splitlines())
            self._steps.add_text(name, indented, counters.step)

    def log(self, counters: Counters, values: dict[str, float]) -> None:
        """Record `values` by tag at the last step."""
        line = {"step": counters.step, **values, tags.TIME: time.time()}
        self._record(counters, partial(self._write_line, line))
        self._record(counters, partial(self._add_scalars, counters, values))
        self._log_to_wandb(counters, values)

    def log_validation(self, counters: Counters, values: dict[str, float]) -> None:
        """Record a validation by steps, FLOPs and tokens."""
        nelbo = values[tags.VAL_NELBO]
        by_flops = {tags.VAL_NELBO_BY_FLOPS: nelbo, tags.FLOPS: counters.flops}
        by_tokens = {tags.VAL_NELBO_BY_TOKENS: nelbo, tags.TOKENS: counters.tokens}
        line = {"step": counters.step, **values, **by_flops, **by_tokens, tags.TIME: time.time()}
        self._record(counters, partial(self._add_scalars, counters, values))
        self._record(counters, partial(self._add_scaling, counters, nelbo))
        self._log_to_wandb(counters, values)
        # The line comes last: the next job does not repeat a validation that has a line.
        self.flush()
        self._record(counters, partial(self._write_line, line))
        self.flush()
        self.validated_step = counters.step

    def flush(self) -> None:
        """Write everything to disk: a checkpoint must not be newer than the records before it."""
        self._try(self._flush if self._failure is None else self._reopen_and_flush)
        if self._failure is None:
            self._since.clear()
            self._flushed = self._last

    def _reopen_and_flush(self) -> None:
        self._reopen()
        self._flush()

    def _flush(self) -> None:
        self._lines.flush()
        os.fsync(self._lines.fileno())
        for writer in (self._steps, self._flops, self._tokens):
            writer.flush()

    def _record(self, counters: Counters, write: Callable[[], None]) -> None:
        self._last = counters
        self._since.append(write)
        if self._failure is None:
            self._try(write)

    def _try(self, action: Callable[[], None]) -> None:
        """Call `action`; log when the file system starts to refuse, and when it accepts again."""
        before = self._failure
        try:
            action()
            self._failure = None
        except OSError as error:
            self._failure = error
        if before is None and self._failure is not None:
            logger.error(
                "%s: %s; records stay in memory until there is room", self._run.path, self._failure
            )
        elif before is not None and self._failure is None:
            logger.warning("%s: it can be written again; all records are written", self._run.path)

    def _add_scalars(self, counters: Counters, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self._steps.add_scalar(tag, value, counters.step)

    def _add_scaling(self, counters: Counters, nelbo: float) -> None:
        self._flops.add_scalar(tags.VAL_NELBO_BY_FLOPS, nelbo, _gigaflops(counters))
        self._tokens.add_scalar(tags.VAL_NELBO_BY_TOKENS, nelbo, counters.tokens)

    def _log_to_wandb(self, counters: Counters, values: dict[str, float]) -> None:
        if self._wandb is not None:
            self._wandb.log(counters.step, values)

    def _write_line(self, values: dict[str, Any]) -> None:
        # JSON knows no infinity and no NaN.
        finite = {
            key: value if math.isfinite(value) else str(value) for key, value in values.items()
        }
        self._lines.write(json.dumps(finite) + "\n")


def open_writer(folder: Path, last_step: int) -> SummaryWriter:
    """Open a TensorBoard writer that hides what an interrupted job wrote after `last_step`."""
    return SummaryWriter(str(folder), purge_step=last_step + 1)


def keep_lines(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Remove the lines of later steps, and a line that a kill cut; return the others."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if values["step"] <= last_step:
            kept.append(values)
    write_text(path, "".join(json.dumps(values) + "\n" for values in kept))
    return kept


def _gigaflops(counters: Counters) -> int:
    return round(counters.flops / GIGA)
