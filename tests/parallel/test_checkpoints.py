"""Checkpoints: what is written is the state, whatever the layout; failures reach every rank."""

import dataclasses
import json
import logging
import resource
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from checkpoints_conversion.__main__ import main as convert
from megatron_eso.errors import CheckpointError, TrainingError
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.steps import list_checkpoints, step_number
from pretrain.initial_weights import convert_initial_weights
from tests.parallel.test_conversion import LLAMA
from tests.parallel.test_resume import resave
from tests.support.loop import run_loop
from tests.support.processes import HANG_SECONDS
from tests.support.training import (
    DISTRIBUTED,
    INTERLEAVED,
    PP2,
    TP2,
    Overrides,
    open_batches,
    read_checkpoint,
    take_step,
    tiny_arguments,
    train_tiny,
)
from tests.support.world import World

pytestmark = pytest.mark.parallel

SEQUENCE_PARALLEL = TP2 | {"parallel.sequence_parallel": "true"}
MODEL: Overrides = LLAMA | {"train.precision": '"bf16"', "train.micro_batch_size": 1}
LAYOUTS: dict[str, tuple[int, Overrides]] = {
    "DP=2": (2, {}),
    "PP=2 interleaved": (2, INTERLEAVED),
    "TP=2 PP=2": (4, TP2 | PP2),
    "TP=2 SP, DP=2 distributed optimizer": (4, SEQUENCE_PARALLEL | DISTRIBUTED),
    "PP=2, DP=2 distributed optimizer": (4, PP2 | DISTRIBUTED),
}
VOCAB_SIZE, PADDED = 400, ("embedding.", "output_layer.")
STEP_BYTES = 4096
"""A limit on the size of files that every part of a checkpoint exceeds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """What the steps of a test left behind on a rank."""

    messages: list[str | None] = dataclasses.field(default_factory=list)
    state: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def build(run: Path, data: Path, overrides: Overrides, groups):  # type: ignore[no-untyped-def]
    """The parts that a training command builds: configuration, batches, state, checkpoints."""
    from megatron_eso.training.checkpointing.checkpoints import Checkpoints
    from megatron_eso.training.steps.train_state import build_train_state
    from tests.support.training import tiny_config

    config = tiny_config(run, data, overrides)
    batches = open_batches(config, groups.dp.size())
    state = build_train_state(config, groups)
    return config, batches, state, Checkpoints(run / "checkpoints", config.checkpoint, batches)


def write_and_tell(run: Path, data: Path, overrides: Overrides) -> Saved:
    """Take two steps on one rank, save, and return the state as it lies in the optimizer."""
    from megatron_eso.training.distributed.cpu_backend import install_cpu_backend

    install_cpu_backend()
    from megatron_eso.training.distributed.parallel import model_parallel_groups
    from tests.support.training import tiny_config

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


def test_every_layout_writes_the_same_whole_state(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    """SwiGLU, tied embedding, GQA, bf16: first held to the tensors of one rank, then re-saved."""
    (told,) = world.run(write_and_tell, 1, tmp_path / "a", tiny_data, MODEL)
    (checkpoint,) = list_checkpoints(tmp_path / "a" / "checkpoints")
    expected = read_checkpoint(checkpoint)
    assert expected.keys() == told.state.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, told.state[name]), name
    for number, (num_ranks, overrides) in enumerate(LAYOUTS.values()):
        run = tmp_path / str(number)
        folder = run / "checkpoints" / checkpoint.name
        folder.parent.mkdir(parents=True)
        folder.symlink_to(checkpoint)
        world.run(resave, num_ranks, run, tiny_data, MODEL | overrides, run / "again")
        found = read_checkpoint(run / "again" / checkpoint.name)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (overrides, name)


def save_beside_a_step(run: Path, data: Path, overrides: Overrides) -> None:
    """Save at once and beside the next step, twice: the second time into memory that is in use."""
    from megatron_eso.training.distributed.cpu_backend import install_cpu_backend

    install_cpu_backend()
    from megatron_eso.training.checkpointing.checkpoints import Checkpoints
    from megatron_eso.training.distributed.parallel import model_parallel_groups
    from tests.support.training import tiny_config

    with model_parallel_groups(tiny_config(run, data, overrides).parallel) as groups:
        config, batches, state, beside = build(run, data, overrides, groups)
        at_once = Checkpoints(run / "at_once", config.checkpoint, batches)
        beside.prepare(state, groups)
        for _ in range(3):
            take_step(config, state, batches, groups)
            beside.wait()
            at_once.save(state, config, groups)
            beside.save(state, config, groups, in_background=True)
        beside.wait()
        assert beside.take_failure() is None


def test_a_save_beside_the_steps_is_the_state_of_its_step(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    overrides: Overrides = DISTRIBUTED | {"train.precision": '"bf16"', "checkpoint.interval": 1}
    world.run(save_beside_a_step, 2, tmp_path, tiny_data, overrides)
    written = list_checkpoints(tmp_path / "checkpoints")
    assert len(written) == 3
    for checkpoint in written:
        expected = read_checkpoint(tmp_path / "at_once" / checkpoint.name)
        for name, tensor in read_checkpoint(checkpoint).items():
            assert torch.equal(tensor, expected.pop(name)), name
        assert not expected


def save_many(run: Path, data: Path, overrides: Overrides, what: list[tuple[float, int]]) -> None:
    """Save steps 1, 2, ... with the validation and the updates left out in a row of each."""
    from megatron_eso.training.distributed.cpu_backend import install_cpu_backend

    install_cpu_backend()
    from megatron_eso.training.distributed.parallel import model_parallel_groups
    from tests.support.training import tiny_config

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


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        ({"keep_last": 1, "keep_best": "false"}, [5, 8]),
        ({"keep_last": 2, "keep_best": "false"}, [5, 7, 8]),
        ({"keep_last": 1, "keep_every": 3, "keep_best": "false"}, [3, 5, 6, 8]),
        ({"keep_last": 1}, [3, 5, 8]),
    ],
)
def test_retention(
    overrides: Overrides, kept: list[int], world: World, tiny_data: Path, tmp_path: Path
) -> None:
    """The last, every n-th, the best, and the last before updates were left out (here 5)."""
    nan = float("nan")
    what = [(nan, 0), (9.0, 0), (2.0, 0), (3.0, 0), (4.0, 0), (5.0, 1), (6.0, 2), (nan, 3)]
    settings = {f"checkpoint.{key}": value for key, value in overrides.items()}
    world.run(save_many, 1, tmp_path, tiny_data, settings, what)
    folder = tmp_path / "checkpoints"
    names = [f"step_{step:08d}" for step in kept]
    assert sorted(path.name for path in folder.iterdir()) == ["latest", *names]
    assert (folder / "latest").read_text() == "step_00000008\n"


def save_in_trouble(run: Path, data: Path, overrides: Overrides, rank: int, how: str) -> Saved:
    """Save where the file system refuses one rank, in the background and not; then where not."""
    from megatron_eso.training.distributed.cpu_backend import install_cpu_backend

    install_cpu_backend()
    from megatron_eso.training.distributed.parallel import model_parallel_groups
    from tests.support.training import tiny_config

    messages: list[str | None] = []
    with model_parallel_groups(tiny_config(run, data, overrides).parallel) as groups:
        config, _, state, checkpoints = build(run, data, overrides, groups)
        checkpoints.save(state, config, groups)
        state.counters = dataclasses.replace(state.counters, step=1)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        is_hit = torch.distributed.get_rank() == rank
        blocked = run / "checkpoints" / "step_00000001.tmp"
        if is_hit and how == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (STEP_BYTES, unlimited[1]))
        elif is_hit:
            blocked.write_text("not a folder")
        torch.distributed.barrier()
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
        messages.append(str([path.name for path in checkpoints.directory.iterdir()]))
        torch.distributed.barrier()
        checkpoints.save(state, config, groups, in_background=True)
        checkpoints.wait()
        messages.append(checkpoints.take_failure())
    return Saved(messages=messages)


@pytest.mark.parametrize(("rank", "how"), [(0, "limit"), (1, "limit"), (0, "file")])
def test_a_write_that_fails_on_one_rank_fails_on_all_and_leaves_the_one_before(
    rank: int, how: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    answers = world.run(save_in_trouble, 2, tmp_path, tiny_data, {}, rank, how)
    for saved in answers:
        at_once, beside, left, after = saved.messages
        for message in (at_once, beside):
            assert message is not None
            assert "step_00000001 could not be saved" in message
            assert ("File too large" if how == "limit" else "Not a directory") in message
        assert left is not None
        assert sorted(json.loads(left.replace("'", '"'))) == ["latest", "step_00000000"]
        assert after is None
    assert answers[0].messages[0] == answers[1].messages[0]
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step_00000000", "step_00000001"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """What came of a start: the step it goes on from, and the log of rank 0."""

    step: int
    log: str


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def restore_each(runs: list[Path], data: Path, overrides: Overrides) -> list[Restored]:
    """Restore one run after the other, in one process group."""
    from megatron_eso.training.distributed.cpu_backend import install_cpu_backend

    install_cpu_backend()
    from megatron_eso.training.checkpointing.restore import restore
    from megatron_eso.training.distributed.parallel import model_parallel_groups
    from tests.support.training import tiny_config

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


def test_a_new_run_starts_from_weights(world: World, tiny_data: Path, tmp_path: Path) -> None:
    """With longer samples and another rotary base: the weights are taken over, all else is new."""
    trained = world.run(train_tiny, 2, tmp_path / "a", tiny_data, DISTRIBUTED, 2)[0].checkpoint
    longer: Overrides = TP2 | {
        "checkpoint.init_from": f'"{tmp_path / "a"}"',
        "data.sequence_length": 32,
        "model.rotary_base": 50000,
        "objective.alpha_0": 0.5,
    }
    run = tmp_path / "b"
    told = world.run(restore_each, 2, [run], tiny_data, longer)[0][0].log
    for line in (
        f"starting from {trained}: loaded are its weights of step 2 (not their moving average)",
        "fresh are Adam's moments, the moving average (it starts at these weights), the learning-",
        "learning-rate schedule, the counters and the order of the samples",
        "changed since step_00000002: data.sequence_length: 24 -> 32",
        "changed since step_00000002: model.rotary_base: 10000 -> 50000",
        "changed since step_00000002: objective.alpha_0: 0.25 -> 0.5",
    ):
        assert line in told
    started = world.run(train_tiny, 2, run, tiny_data, longer, 0)[0].checkpoint
    assert started.name == "step_00000000"
    before, after = read_checkpoint(trained), read_checkpoint(started)
    for name in after:
        bare = name.removeprefix("ema.")
        if name.startswith("optimizer."):
            assert not after[name].any()
        else:
            assert torch.equal(after[name], before[bare]), name
    state = json.loads((started / "state.json").read_text())
    assert [state[key] for key in ("step", "consumed_samples", "ema_updates")] == [0, 0, 0]


def test_what_changes_on_resume_is_told(world: World, tiny_data: Path, tmp_path: Path) -> None:
    world.run(train_tiny, 1, tmp_path, tiny_data, {}, 2)
    changed: Overrides = PP2 | {
        "optimizer.learning_rate": 0.5,
        "train.global_batch_size": 4,
        "train.num_steps": 7,
    }
    told = world.run(restore_each, 2, [tmp_path], tiny_data, changed)[0][0].log
    for line in (
        "changed since step_00000002: optimizer.learning_rate: 0.01 -> 0.5",
        "changed since step_00000002: train.global_batch_size: 8 -> 4",
        "changed since step_00000002: train.num_steps: 5 -> 7",
        "changed since step_00000002: parallel.pipeline_model_parallel_size: 1 -> 2",
        "step 2, sample 16: weights, Adam's moments, counters, moving average",
    ):
        assert line in told


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


def test_a_run_that_fails_ends_the_save_in_the_background(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    answers = world.run(run_loop, 2, tmp_path, tiny_data, {"checkpoint.interval": 2}, stumble)
    assert [answer.error for answer in answers] == ["no third step"] * 2
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_00000002"]


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


def test_a_save_that_failed_is_tried_again(world: World, tiny_data: Path, tmp_path: Path) -> None:
    """Long before the next one is due by steps."""
    overrides: Overrides = {"train.num_steps": 30, "checkpoint.interval": 20}
    assert world.run(run_with_quick_retries, 1, tmp_path, tiny_data, overrides) == [None]
    again, last = (step_number(path) for path in list_checkpoints(tmp_path / "checkpoints"))
    assert again == 21
    assert last == 30


def test_saves_go_by_the_clock_as_well(world: World, tiny_data: Path, tmp_path: Path) -> None:
    overrides: Overrides = {"train.num_steps": 3, "checkpoint.interval_minutes": 1e-6}
    world.run(run_loop, 2, tmp_path, tiny_data, overrides)
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step_00000001", "step_00000002", "step_00000003"]


@pytest.mark.slow
def test_training_starts_from_a_sampler_directory(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    trained = world.run(train_tiny, 1, tmp_path / "a", tiny_data, {}, 2)[0].checkpoint
    convert(["to-sampler", str(tmp_path / "a"), str(tmp_path / "sampler"), "--weights", "raw"])
    overrides: Overrides = {
        "checkpoint.init_from": f'"{tmp_path / "sampler"}"',
        "optimizer.learning_rate": 1e-30,  # too little to change a bit
        "train.num_steps": 1,
    }
    run = tmp_path / "b"
    command = [sys.executable, "-m", "pretrain.train", *tiny_arguments(run, tiny_data, overrides)]
    told = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True).stderr
    assert f"starting from {run}/init_from" in told
    before = read_checkpoint(trained)
    after = read_checkpoint(run / "checkpoints" / "step_00000001")
    for name, tensor in before.items():
        if not name.startswith(("optimizer.", "ema.")):
            rows = slice(VOCAB_SIZE if name.startswith(PADDED) else None)
            assert torch.equal(after[name][rows], tensor[rows]), name
    convert_initial_weights(str(tmp_path / "sampler"), RunDirectory(run))
    assert not (run / "init_from").exists()
