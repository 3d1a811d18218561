"""Checkpoints: what is written is the state, whatever the layout; failures reach every rank."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints_conversion.__main__ import main as convert
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.steps import list_checkpoints, step_number
from pretrain.initial_weights import convert_initial_weights
from tests.ranks.checkpoints import (
    restore_each,
    run_with_quick_retries,
    save_during_a_step,
    save_in_trouble,
    save_many,
    stumble,
    write_and_return,
)
from tests.ranks.loop import run_loop
from tests.ranks.training import resave, train_tiny
from tests.support.training import (
    DISTRIBUTED,
    INTERLEAVED,
    LLAMA,
    PP2,
    TP2,
    Overrides,
    read_checkpoint,
    tiny_arguments,
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


def test_every_layout_writes_the_same_whole_state(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    """SwiGLU, tied embedding, GQA, bf16: first held to the tensors of one rank, then re-saved."""
    (written,) = world.run(write_and_return, 1, tmp_path / "a", tiny_data, MODEL)
    (checkpoint,) = list_checkpoints(tmp_path / "a" / "checkpoints")
    expected = read_checkpoint(checkpoint)
    assert expected.keys() == written.state.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, written.state[name]), name
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


def test_a_save_during_the_steps_is_the_state_of_its_step(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    overrides: Overrides = DISTRIBUTED | {"train.precision": '"bf16"', "checkpoint.interval": 1}
    world.run(save_during_a_step, 2, tmp_path, tiny_data, overrides)
    written = list_checkpoints(tmp_path / "checkpoints")
    assert len(written) == 3
    for checkpoint in written:
        expected = read_checkpoint(tmp_path / "at_once" / checkpoint.name)
        for name, tensor in read_checkpoint(checkpoint).items():
            assert torch.equal(tensor, expected.pop(name)), name
        assert not expected


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
    """The last, every n-th, the best, and the last before updates were skipped (here 5)."""
    nan = float("nan")
    what = [(nan, 0), (9.0, 0), (2.0, 0), (3.0, 0), (4.0, 0), (5.0, 1), (6.0, 2), (nan, 3)]
    settings = {f"checkpoint.{key}": value for key, value in overrides.items()}
    world.run(save_many, 1, tmp_path, tiny_data, settings, what)
    folder = tmp_path / "checkpoints"
    names = [f"step_{step:08d}" for step in kept]
    assert sorted(path.name for path in folder.iterdir()) == ["latest", *names]
    assert (folder / "latest").read_text() == "step_00000008\n"


@pytest.mark.parametrize(("rank", "how"), [(0, "limit"), (1, "limit"), (0, "file")])
def test_a_write_that_fails_on_one_rank_fails_on_all_and_leaves_the_one_before(
    rank: int, how: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    answers = world.run(save_in_trouble, 2, tmp_path, tiny_data, {}, rank, how)
    for saved in answers:
        at_once, in_background, left, after = saved.messages
        for message in (at_once, in_background):
            assert message is not None
            assert "step_00000001 could not be saved" in message
            assert ("File too large" if how == "limit" else "Not a directory") in message
        assert left is not None
        assert sorted(json.loads(left.replace("'", '"'))) == ["latest", "step_00000000"]
        assert after is None
    assert answers[0].messages[0] == answers[1].messages[0]
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step_00000000", "step_00000001"]


def test_a_new_run_starts_from_weights(world: World, tiny_data: Path, tmp_path: Path) -> None:
    """Start with longer samples and another rotary base: only the weights come from the old run."""
    # The log names what is read and what changes.
    trained = world.run(train_tiny, 2, tmp_path / "a", tiny_data, DISTRIBUTED, 2)[0].checkpoint
    longer: Overrides = TP2 | {
        "checkpoint.init_from": f'"{tmp_path / "a"}"',
        "data.sequence_length": 32,
        "model.rotary_base": 50000,
        "model.rope_scaling": "true",
        "objective.alpha_0": 0.5,
    }
    run = tmp_path / "b"
    log = world.run(restore_each, 2, [run], tiny_data, longer)[0][0].log
    for line in (
        f"starting from {trained}: read the weights of step 2 (not their moving average)",
        "Adam's moments, the moving average (it starts at these weights), the learning-rate ",
        "learning-rate schedule, the counters and the order of the samples start fresh",
        "changed since step_00000002: data.sequence_length: 24 -> 32",
        "changed since step_00000002: model.rotary_base: 10000 -> 50000",
        "changed since step_00000002: model.rope_scaling: false -> true",
        "changed since step_00000002: objective.alpha_0: 0.25 -> 0.5",
    ):
        assert line in log
    # The first checkpoint holds the weights, and zeros for everything else.
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


def test_what_changes_on_resume_is_logged(world: World, tiny_data: Path, tmp_path: Path) -> None:
    world.run(train_tiny, 1, tmp_path, tiny_data, {}, 2)
    changed: Overrides = PP2 | {
        "optimizer.learning_rate": 0.5,
        "train.global_batch_size": 4,
        "train.num_steps": 7,
    }
    log = world.run(restore_each, 2, [tmp_path], tiny_data, changed)[0][0].log
    for line in (
        "changed since step_00000002: optimizer.learning_rate: 0.01 -> 0.5",
        "changed since step_00000002: train.global_batch_size: 8 -> 4",
        "changed since step_00000002: train.num_steps: 5 -> 7",
        "changed since step_00000002: parallel.pipeline_model_parallel_size: 1 -> 2",
        "step 2, sample 16: weights, Adam's moments, counters, moving average",
    ):
        assert line in log


def test_a_run_that_fails_ends_the_save_in_the_background(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    answers = world.run(run_loop, 2, tmp_path, tiny_data, {"checkpoint.interval": 2}, stumble)
    assert [answer.error for answer in answers] == ["no third step"] * 2
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_00000002"]


def test_a_save_that_failed_is_retried(world: World, tiny_data: Path, tmp_path: Path) -> None:
    """Long before the next one is due by steps."""
    overrides: Overrides = {"train.num_steps": 30, "checkpoint.interval": 20}
    assert world.run(run_with_quick_retries, 1, tmp_path, tiny_data, overrides) == [None]
    again, last = (step_number(path) for path in list_checkpoints(tmp_path / "checkpoints"))
    assert again == 21
    assert last == 30


def test_saves_are_due_by_the_clock_as_well(world: World, tiny_data: Path, tmp_path: Path) -> None:
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
    log = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True).stderr
    assert f"starting from {run}/init_from" in log
    before = read_checkpoint(trained)
    after = read_checkpoint(run / "checkpoints" / "step_00000001")
    for name, tensor in before.items():
        if not name.startswith(("optimizer.", "ema.")):
            rows = slice(VOCAB_SIZE if name.startswith(PADDED) else None)
            assert torch.equal(after[name][rows], tensor[rows]), name
    convert_initial_weights(str(tmp_path / "sampler"), RunDirectory(run))
    assert not (run / "init_from").exists()
