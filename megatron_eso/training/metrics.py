"""Where the numbers of a run go: metrics.jsonl and TensorBoard, under the same tags."""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter

from megatron_eso.config import Config
from megatron_eso.config_io import config_to_toml
from megatron_eso.files import write_atomically
from megatron_eso.training.run_directory import RunDirectory
from megatron_eso.training.train_state import Counters

GIGA = 1e9


class MetricsLog:
    """Continues the records of a run from a step, as if it had never been interrupted.

    Entries past `counters.step`, which a killed job left behind, are dropped. The two curves with
    an axis of their own lie in TensorBoard runs of their own, since TensorBoard purges by step.

    Args:
        run: The run's directory.
        counters: How far the run has come.
    """

    def __init__(self, run: RunDirectory, counters: Counters) -> None:
        self._run = run
        self._open(counters)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def rewind(self, counters: Counters) -> None:
        """Drop what lies past `counters.step`: the run has gone back to it."""
        self._close()
        self._open(counters)

    def _open(self, counters: Counters) -> None:
        run = self._run
        keep_lines(run.metrics, counters.step)
        self._lines = run.metrics.open("a", buffering=1)
        self._steps = open_writer(run.tensorboard, counters.step)
        self._flops = open_writer(run.tensorboard / "scaling_by_flops", _gigaflops(counters))
        self._tokens = open_writer(run.tensorboard / "scaling_by_tokens", counters.tokens)

    def _close(self) -> None:
        self._lines.close()
        for writer in (self._steps, self._flops, self._tokens):
            writer.close()

    def log_config(self, config: Config) -> None:
        """Show the resolved configuration in TensorBoard's text tab."""
        indented = "\n".join(f"    {line}" for line in config_to_toml(config).splitlines())
        self._steps.add_text("config", indented)

    def log(self, counters: Counters, values: dict[str, float]) -> None:
        """Record `values` by tag at the step that was taken last."""
        self._write_line({"step": counters.step, **values})
        for tag, value in values.items():
            self._steps.add_scalar(tag, value, counters.step)

    def log_validation(self, counters: Counters, values: dict[str, float]) -> None:
        """Record a validation, by steps and on the axes of the scaling curves."""
        nelbo = values["val/nelbo"]
        by_flops = {"scaling/val_nelbo_by_flops": nelbo, "progress/flops": counters.flops}
        by_tokens = {"scaling/val_nelbo_by_tokens": nelbo, "progress/tokens": counters.tokens}
        self._write_line({"step": counters.step, **values, **by_flops, **by_tokens})
        for tag, value in values.items():
            self._steps.add_scalar(tag, value, counters.step)
        self._flops.add_scalar("scaling/val_nelbo_by_flops", nelbo, _gigaflops(counters))
        self._tokens.add_scalar("scaling/val_nelbo_by_tokens", nelbo, counters.tokens)

    def flush(self) -> None:
        """Have everything on disk: a checkpoint must not be newer than the records before it."""
        self._lines.flush()
        os.fsync(self._lines.fileno())
        for writer in (self._steps, self._flops, self._tokens):
            writer.flush()

    def _write_line(self, values: dict[str, Any]) -> None:
        # JSON knows no infinity and no NaN.
        finite = {
            key: value if math.isfinite(value) else str(value) for key, value in values.items()
        }
        self._lines.write(json.dumps(finite) + "\n")


def open_writer(folder: Path, last_step: int) -> SummaryWriter:
    """A TensorBoard writer that hides what an interrupted job wrote past `last_step`."""
    return SummaryWriter(str(folder), purge_step=last_step + 1)


def keep_lines(path: Path, last_step: int) -> None:
    """Drop the lines of later steps, and one that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            step = json.loads(line)["step"]
        except ValueError:
            continue
        if step <= last_step:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))


def _gigaflops(counters: Counters) -> int:
    return round(counters.flops / GIGA)
