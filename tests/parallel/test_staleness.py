"""Saves are alive: what moved has moved in the checkpoint, and a tensor that is stale is found."""

import dataclasses
import logging
from collections import ChainMap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_eso.runs.checkpoint import PREFIXES
from megatron_eso.runs.steps import list_checkpoints, step_name, step_number
from tests.parallel.test_checkpoints import Lines, build
from tests.support.training import DISTRIBUTED, OVERLAPPED, Overrides, read_checkpoint, take_step
from tests.support.world import World

pytestmark = pytest.mark.parallel

BF16: Overrides = {"train.precision": '"bf16"'}
LAYOUTS: dict[str, Overrides] = {
    "DP=2": {},
    "DP=2 bf16": BF16,
    "DP=2 distributed optimizer, bf16": DISTRIBUTED | BF16,
    "DP=2 overlapped, bf16": OVERLAPPED | BF16,
}
NUM_STEPS = 4
STALE = "is not the state at the moment of the save"
STILL = "not changed since the save before"


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
    from megatron_eso.training.distributed.cpu_backend import install_cpu_backend

    install_cpu_backend()
    from megatron_eso.training.distributed.parallel import model_parallel_groups
    from tests.support.training import tiny_config

    errors = watch_errors()
    with model_parallel_groups(tiny_config(run, data, overrides).parallel) as groups:
        config, batches, state, checkpoints = build(run, data, overrides, groups)
        for _ in range(num_steps):
            take_step(config, state, batches, groups)
            checkpoints.save(state, config, groups, in_background=in_background)
        checkpoints.wait()
        failure = checkpoints.take_failure()
    return errors.lines + ([failure] if failure else [])


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_successive_checkpoints_differ_in_every_tensor(
    layout: str, in_background: bool, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    """Check weights, both moments and the average: each of them changes in these steps."""
    arguments = (tmp_path, tiny_data, LAYOUTS[layout], NUM_STEPS, in_background)
    assert world.run(save_each_step, 2, *arguments) == [[], []]
    written = list_checkpoints(tmp_path / "checkpoints")
    assert len(written) == NUM_STEPS
    before = read_checkpoint(written[0])
    for kind in PREFIXES.values():
        assert any(name.startswith(kind) for name in before)
    for checkpoint in written[1:]:
        now = read_checkpoint(checkpoint)
        assert now.keys() == before.keys()
        still = [name for name, tensor in now.items() if torch.equal(tensor, before[name])]
        assert still == [], checkpoint.name
        before = now


HONEST: dict[str, Overrides] = {
    "tokens that do not occur": BF16 | {"optimizer.weight_decay": 0.0, "train.num_steps": 12},
    "closed residual gates": {"model.residual_gates": "true"},
    "closed residual gates, bf16": DISTRIBUTED | BF16 | {"model.residual_gates": "true"},
    "a learning rate too small for any bit": {"optimizer.learning_rate": 1e-30},
    "the same in bf16": OVERLAPPED | BF16 | {"optimizer.learning_rate": 1e-30},
    "a slow average": {"optimizer.ema_decay": 0.9999999, "optimizer.learning_rate": 1e-6},
}


@pytest.mark.parametrize("case", HONEST)
def test_what_stands_still_honestly_is_not_suspected(
    case: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    overrides = HONEST[case]
    num_steps = overrides.get("train.num_steps", NUM_STEPS)
    arguments = (tmp_path, tiny_data, overrides, num_steps, True)
    assert world.run(save_each_step, 2, *arguments) == [[], []]


def save_without_updates(run: Path, data: Path, overrides: Overrides) -> list[str]:
    """Save twice at one step, after an update that was left out, and after going back."""
    from megatron_eso.training.distributed.cpu_backend import install_cpu_backend

    install_cpu_backend()
    from megatron_eso.training.checkpointing.state import load_training_state
    from megatron_eso.training.distributed.parallel import model_parallel_groups
    from tests.support.training import tiny_config

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


def test_without_an_update_nothing_is_expected(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    found = world.run(save_without_updates, 2, tmp_path, tiny_data, DISTRIBUTED | BF16)
    assert found == [[], []]
    steps = [step_number(path) for path in list_checkpoints(tmp_path / "checkpoints")]
    assert steps == [1, 2, 5]


def save_stale_copies(run: Path, data: Path, overrides: Overrides, how: str) -> list[str | None]:
    """Save in the background with copies that are not the state, then with sound ones."""
    from megatron_eso.training.distributed.cpu_backend import install_cpu_backend

    install_cpu_backend()
    from megatron_eso.training.distributed.parallel import model_parallel_groups
    from tests.support.training import tiny_config

    failures = []
    with model_parallel_groups(tiny_config(run, data, overrides).parallel) as groups:
        config, batches, state, checkpoints = build(run, data, overrides, groups)
        take_step(config, state, batches, groups)
        checkpoints.save(state, config, groups, in_background=True)
        checkpoints.wait()
        copy, write = checkpoints._host.copy, checkpoints._write
        kept = copy(list_own_parts(state, groups))

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


def list_own_parts(state, groups):  # type: ignore[no-untyped-def]
    from megatron_eso.training.checkpointing.state import list_parts

    return list_parts(state, groups)


@pytest.mark.parametrize("how", ["not refreshed", "overwritten"])
@pytest.mark.parametrize("overrides", [{}, DISTRIBUTED | BF16], ids=["plain", "distributed"])
def test_copies_that_are_not_the_state_fail_the_save(
    how: str, overrides: Overrides, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    for failure, after in world.run(save_stale_copies, 2, tmp_path, tiny_data, overrides, how):
        assert failure is not None
        assert failure.startswith("step_00000002 could not be saved: what was written of ")
        assert STALE in failure
        assert how == "not refreshed" or "ema." in failure
        assert after is None
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == [step_name(1), step_name(2)]


def save_cut_off(run: Path, data: Path, overrides: Overrides, what: str) -> list[str]:
    """Save twice, with a part of the state that no update reaches any more."""
    from megatron_eso.training.distributed.cpu_backend import install_cpu_backend

    install_cpu_backend()
    from megatron_eso.training.distributed.parallel import model_parallel_groups
    from tests.support.training import tiny_config

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
    """The parameter with a main parameter, or a moment of it, that nothing updates."""
    if parameter.main is None:
        return parameter
    main, moments = parameter.main, parameter.inner.state[parameter.main]
    if what == "":
        main = main.detach().clone()
    else:
        moment = what.split(".")[2]
        moments = ChainMap({moment: moments[moment].clone()}, moments)
    return dataclasses.replace(parameter, main=main, inner=SimpleNamespace(state={main: moments}))


@pytest.mark.parametrize("what", PREFIXES.values())
def test_what_is_cut_off_from_the_network_is_logged_and_saved(
    what: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    for lines in world.run(save_cut_off, 2, tmp_path, tiny_data, DISTRIBUTED | BF16, what):
        (line,) = lines
        assert line.startswith(f"step_00000002: {what}")
        assert STILL in line
        assert " more: " in line
        for other in set(PREFIXES.values()) - {what, ""}:
            assert other not in line
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == [step_name(1), step_name(2)]
