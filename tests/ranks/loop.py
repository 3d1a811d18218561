"""Whole training runs, as the command makes them, on the ranks of `world.run`."""

import logging
import os
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
from megatron_eso.training.guards.stop import StopRequests
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
    """Train to the end, or to what ends it.

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
        stop = stack.enter_context(StopRequests(directory, 0.0))
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


@contextmanager
def as_launched(rank: int, num_ranks: int) -> Iterator[None]:
    """What a launcher sets, a process group that is there already, and logging as it was."""
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
