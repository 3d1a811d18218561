"""Saves of states that move, stand still, or are not what is written."""

import dataclasses
import logging
from collections import ChainMap
from pathlib import Path
from types import SimpleNamespace

import torch

from megatron_eso.training.checkpointing.state import list_parts, load_training_state
from megatron_eso.training.distributed.parallel import model_parallel_groups
from tests.ranks.checkpoints import Lines, build
from tests.ranks.training import take_step
from tests.support.training import Overrides, tiny_config


def watch_errors() -> Lines:
    """Keep what this rank logs as an error from now on."""
    logger = logging.getLogger("megatron_eso.training.checkpointing")
    for handler in [handler for handler in logger.handlers if isinstance(handler, Lines)]:
        logger.removeHandler(handler)
    lines = Lines()
    lines.setLevel(logging.ERROR)
    logger.addHandler(lines)
    return lines


def save_each_step(
    run: Path, data: Path, overrides: Overrides, num_steps: int, in_background: bool
) -> list[str]:
    """Save after each step; the errors of this rank, logged or of a save that failed."""
    errors = watch_errors()
    with model_parallel_groups(tiny_config(run, data, overrides).parallel) as groups:
        config, batches, state, checkpoints = build(run, data, overrides, groups)
        for _ in range(num_steps):
            take_step(config, state, batches, groups)
            checkpoints.save(state, config, groups, in_background=in_background)
        checkpoints.wait()
        failure = checkpoints.take_failure()
    return errors.lines + ([failure] if failure else [])


def save_without_updates(run: Path, data: Path, overrides: Overrides) -> list[str]:
    """Save twice at one step, after an update that was left out, and after going back."""
    errors = watch_errors()
    with model_parallel_groups(tiny_config(run, data, overrides).parallel) as groups:
        config, batches, state, checkpoints = build(run, data, overrides, groups)
        take_step(config, state, batches, groups)
        first = checkpoints.save(state, config, groups)
        checkpoints.save(state, config, groups)
        counters = state.counters
        state.counters = dataclasses.replace(
            counters, step=counters.step + 1, skipped_steps=1, skipped_in_row=1
        )
        checkpoints.save(state, config, groups)
        take_step(config, state, batches, groups)
        load_training_state(first, state)
        # The save before holds the same state, and this one counts more updates.
        state.counters = dataclasses.replace(state.counters, step=5, rollbacks=1)
        checkpoints.save(state, config, groups)
    return errors.lines


def save_stale_copies(run: Path, data: Path, overrides: Overrides, how: str) -> list[str | None]:
    """Save in the background with copies that are not the state, then with sound ones."""
    failures = []
    with model_parallel_groups(tiny_config(run, data, overrides).parallel) as groups:
        config, batches, state, checkpoints = build(run, data, overrides, groups)
        take_step(config, state, batches, groups)
        checkpoints.save(state, config, groups, in_background=True)
        checkpoints.wait()
        copy, write = checkpoints._host.copy, checkpoints._write
        kept = copy(list_parts(state, groups))

        def overwrite(final, parts, *rest):  # type: ignore[no-untyped-def]
            if torch.distributed.get_rank() == 1:
                parts["ema"][0].values.add_(1.0)
            write(final, parts, *rest)

        take_step(config, state, batches, groups)
        if how == "not refreshed":
            checkpoints._host.copy = lambda parts: kept
        else:
            checkpoints._write = overwrite
        for _ in range(2):
            checkpoints.save(state, config, groups, in_background=True)
            checkpoints.wait()
            failures.append(checkpoints.take_failure())
            checkpoints._host.copy, checkpoints._write = copy, write
    return failures


def save_cut_off(run: Path, data: Path, overrides: Overrides, what: str) -> list[str]:
    """Save twice, with a part of the state that no update reaches any more."""
    errors = watch_errors()
    with model_parallel_groups(tiny_config(run, data, overrides).parallel) as groups:
        config, batches, state, checkpoints = build(run, data, overrides, groups)
        take_step(config, state, batches, groups)
        if what == "ema.":
            state.ema.update = lambda: None
        else:
            state.parameters = [cut_off(parameter, what) for parameter in state.parameters]
        checkpoints.save(state, config, groups, in_background=True)
        take_step(config, state, batches, groups)
        checkpoints.save(state, config, groups, in_background=True)
        checkpoints.wait()
        assert checkpoints.take_failure() is None
    return errors.lines


def cut_off(parameter, what: str):  # type: ignore[no-untyped-def]
    """Return the parameter with a main parameter, or a moment of it, that nothing updates."""
    if parameter.main is None:
        return parameter
    main, moments = parameter.main, parameter.inner.state[parameter.main]
    if what == "":
        main = main.detach().clone()
    else:
        moment = what.split(".")[2]
        moments = ChainMap({moment: moments[moment].clone()}, moments)
    return dataclasses.replace(parameter, main=main, inner=SimpleNamespace(state={main: moments}))
