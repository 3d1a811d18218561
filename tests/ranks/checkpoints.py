"""Checkpoints that ranks write and read, also where the file system refuses."""

import dataclasses
import logging
import resource
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_eso.errors import CheckpointError, TrainingError
from megatron_eso.training.checkpointing.checkpoints import Checkpoints
from megatron_eso.training.checkpointing.restore import restore
from megatron_eso.training.distributed.parallel import model_parallel_groups
from megatron_eso.training.steps.train_state import build_train_state
from tests.ranks.loop import run_loop
from tests.ranks.training import open_batches, take_step
from tests.support.processes import HANG_SECONDS
from tests.support.training import (
    Overrides,
    tiny_config,
)

STEP_BYTES = 4096
"""A limit on the size of files that every part of a checkpoint exceeds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """What the steps of a test left behind on a rank."""

    messages: list[str | None] = dataclasses.field(default_factory=list)
    state: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def build(run: Path, data: Path, overrides: Overrides, groups):  # type: ignore[no-untyped-def]
    """Build the parts of a training command: configuration, batches, state, checkpoints."""
    config = tiny_config(run, data, overrides)
    batches = open_batches(config, groups.dp.size())
    state = build_train_state(config, groups)
    return config, batches, state, Checkpoints(run / "checkpoints", config.checkpoint, batches)


def write_and_return(run: Path, data: Path, overrides: Overrides) -> Saved:
    """Take two steps on one rank, save, and return the state as it lies in the optimizer."""
    with model_parallel_groups(tiny_config(run, data, overrides).parallel) as groups:
        config, batches, state, checkpoints = build(run, data, overrides, groups)
        for _ in range(2):
            take_step(config, state, batches, groups)
        checkpoints.save(state, config, groups)
        found = {}
        averages = state.ema.averages
        for parameter, average in zip(state.parameters, averages, strict=True):
            key, moments = parameter.sharded.key, parameter.inner.state[parameter.main]
            found[key] = parameter.main.detach().clone()
            found[f"ema.{key}"] = average.clone()
            for name in ("exp_avg", "exp_avg_sq"):
                found[f"optimizer.state.{name}.{key}"] = moments[name].clone()
    return Saved(state=found)


def save_during_a_step(run: Path, data: Path, overrides: Overrides) -> None:
    """Save at once and during the next step, twice: the second time into memory that is in use."""
    with model_parallel_groups(tiny_config(run, data, overrides).parallel) as groups:
        config, batches, state, background = build(run, data, overrides, groups)
        at_once = Checkpoints(run / "at_once", config.checkpoint, batches)
        background.prepare(state, groups)
        for _ in range(3):
            take_step(config, state, batches, groups)
            background.wait()
            at_once.save(state, config, groups)
            background.save(state, config, groups, in_background=True)
        background.wait()
        assert background.take_failure() is None


def save_many(run: Path, data: Path, overrides: Overrides, what: list[tuple[float, int]]) -> None:
    """Save steps 1, 2, ... with the validation and the updates left out in a row of each."""
    with model_parallel_groups(tiny_config(run, data, overrides).parallel) as groups:
        config, _, state, checkpoints = build(run, data, overrides, groups)
        for val_nelbo, skipped_in_row in what:
            state.counters = dataclasses.replace(
                state.counters, step=state.counters.step + 1, skipped_in_row=skipped_in_row
            )
            checkpoints.save(state, config, groups, val_nelbo=val_nelbo)
            if state.counters.step == 2:  # what killed jobs leave, and damage
                for name in ("step_00000001.tmp", "step_00000009.deleting"):
                    (checkpoints.directory / name).mkdir()
                (checkpoints.directory / "step_00000002" / "state.json").write_text("{")


def save_in_trouble(run: Path, data: Path, overrides: Overrides, rank: int, how: str) -> Saved:
    """Save where the file system refuses one rank, in the background and not; then where not."""
    messages: list[str | None] = []
    with model_parallel_groups(tiny_config(run, data, overrides).parallel) as groups:
        config, _, state, checkpoints = build(run, data, overrides, groups)
        checkpoints.save(state, config, groups)
        state.counters = dataclasses.replace(state.counters, step=1)
        # Limit the size of files on one rank, or put a file where its folder belongs.
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        is_hit = torch.distributed.get_rank() == rank
        blocked = run / "checkpoints" / "step_00000001.tmp"
        if is_hit and how == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (STEP_BYTES, unlimited[1]))
        elif is_hit:
            blocked.write_text("not a folder")
        torch.distributed.barrier()
        # Save at once and in the background: both fail.
        try:
            with pytest.raises(CheckpointError) as raised:
                checkpoints.save(state, config, groups)
            messages.append(str(raised.value))
            if is_hit and how == "file":
                blocked.write_text("not a folder")
            torch.distributed.barrier()
            checkpoints.save(state, config, groups, in_background=True)
            checkpoints.wait()
            messages.append(checkpoints.take_failure())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            if blocked.is_file() and is_hit:
                blocked.unlink()
        torch.distributed.barrier()
        # Without the obstacle, a save succeeds.
        messages.append(str([path.name for path in checkpoints.directory.iterdir()]))
        torch.distributed.barrier()
        checkpoints.save(state, config, groups, in_background=True)
        checkpoints.wait()
        messages.append(checkpoints.take_failure())
    return Saved(messages=messages)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """The result of a start: the step that it continues from, and the log of rank 0."""

    step: int
    log: str


class Lines(logging.Handler):
    """A handler that keeps the lines of the log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def restore_each(runs: list[Path], data: Path, overrides: Overrides) -> list[Restored]:
    """Restore one run after the other, in one process group."""
    answers = []
    with model_parallel_groups(tiny_config(runs[0], data, overrides).parallel) as groups:
        for run in runs:
            lines = Lines()
            logging.getLogger("megatron_eso").addHandler(lines)
            logging.getLogger("megatron_eso").setLevel(logging.INFO)
            config, _, state, checkpoints = build(run, data, overrides, groups)
            restore(state, config, checkpoints)
            logging.getLogger("megatron_eso").removeHandler(lines)
            answers.append(Restored(step=state.counters.step, log="\n".join(lines.lines)))
    return answers


def stumble(trainer, _gathered: list[None]) -> None:  # type: ignore[no-untyped-def]
    """Have the third step fail on every rank, while the checkpoint of the second is written."""
    take, write = trainer.prefetcher.take, trainer.saves.checkpoints._write
    has_failed = threading.Event()

    def fail_after_two(step: object) -> object:
        if trainer.state.counters.step == 2:
            has_failed.set()
            raise TrainingError("no third step")
        return take(step)

    def write_slowly(*arguments: object) -> None:
        assert has_failed.wait(HANG_SECONDS)
        write(*arguments)

    trainer.prefetcher.take = fail_after_two
    trainer.saves.checkpoints._write = write_slowly


def stumble_once(trainer, _gathered: list[None]) -> None:  # type: ignore[no-untyped-def]
    """Have the first save fail, as a full disk makes it; no step begins while one is written."""
    take, write = trainer.prefetcher.take, trainer.saves.checkpoints._write

    def fail(*_: object) -> None:
        trainer.saves.checkpoints._write = write
        raise CheckpointError("no room")

    def take_after_saves(step: object) -> object:
        trainer.saves.checkpoints.wait()
        return take(step)

    trainer.saves.checkpoints._write = fail
    trainer.prefetcher.take = take_after_saves


def run_with_quick_retries(run: Path, data: Path, overrides: Overrides) -> str | None:
    with mock.patch("megatron_eso.training.checkpointing.saves.RETRY_SECONDS", 0.0):
        return run_loop(run, data, overrides, stumble_once).error
