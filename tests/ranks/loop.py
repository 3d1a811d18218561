"""Whole training runs, as the command makes them, on the ranks of `world.run`."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from megatron_eso.config.loading import load_config
from megatron_eso.errors import UserError
from megatron_eso.training import job
from megatron_eso.training.guards.stop import END_TIME_VARIABLE, StopRequests
from pretrain.start import open_inputs
from tests.support.training import Overrides, tiny_arguments


@dataclass(frozen=True, kw_only=True)
class Ran:
    """How a rank's run ended: what it raised, its counters, and what a hook has gathered."""

    error: str | None
    counters: Any
    gathered: list[Any]


def run_loop(
    run: Path,
    data: Path,
    overrides: Overrides,
    hook: Callable[..., None] | None = None,
    *arguments: Any,
) -> Ran:
    """Train until the run ends or is stopped.

    Args:
        run: The run directory.
        data: Of the fixture `tiny_data`.
        overrides: Of the small configuration.
        hook: Called as `hook(trainer, gathered, *arguments)` before the first step.
        *arguments: For the hook.
    """
    inputs = open_inputs(load_config(tiny_arguments(run, data, overrides)))
    directory = job.locate_run(inputs.config)
    error, gathered = None, []
    with ExitStack() as stack:
        stack.enter_context(as_launched(dist.get_rank(), dist.get_world_size()))
        margin_seconds = 60 * inputs.config.checkpoint.end_margin_minutes
        stop = stack.enter_context(StopRequests(directory, margin_seconds))
        trainer = job.build_trainer(
            inputs.config, inputs.train, inputs.validation, directory, stop, stack
        )
        if hook is not None:
            hook(trainer, gathered, *arguments)
        try:
            job.train_to_the_end(trainer)
        except UserError as raised:
            error = str(raised)
        return Ran(error=error, counters=trainer.state.counters, gathered=gathered)


def run_until_stopped(
    run: Path, data: Path, overrides: Overrides, is_file: bool, end_minutes: int
) -> None:
    """Train until the file `requeue` or the end of the allocation stops the run.

    Args:
        run: The run directory.
        data: Of the fixture `tiny_data`.
        overrides: Of the small configuration.
        is_file: Whether the file is written, before the first step.
        end_minutes: Minutes from now to the end of the allocation; 0: there is none.
    """
    end = {END_TIME_VARIABLE: str(int(time.time()) + 60 * end_minutes)} if end_minutes else {}
    with mock.patch.dict(os.environ, end):
        run_loop(run, data, overrides, request_requeue if is_file else None, run)


def request_requeue(_trainer: Any, _gathered: list[Any], run: Path) -> None:
    """Write the file that stops the run."""
    (run / "requeue").touch()


@contextmanager
def as_launched(rank: int, num_ranks: int) -> Iterator[None]:
    """Set what a launcher sets; keep the process group that is there, and restore the logging."""
    environment = {"RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.setLevel(logging.INFO)
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch("megatron_eso.training.job.process_group", nullcontext),
    ):
        try:
            yield
        finally:
            for handler in set(root.handlers) - set(handlers):
                handler.close()
                root.removeHandler(handler)
            root.setLevel(level)
