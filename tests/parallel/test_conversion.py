"""Converted directories hold the network that was trained: logits, bytes and the way back."""

from pathlib import Path

import pytest
import torch

from checkpoints_conversion.__main__ import main as convert
from megatron_eso.sampler import EsoLM
from tests.ranks.network import compute_logits
from tests.ranks.training import resave, train_tiny
from tests.support.training import (
    DISTRIBUTED,
    GATED,
    INTERLEAVED,
    LLAMA,
    PP2,
    SCALED,
    TP2,
    Overrides,
    read_checkpoint,
)
from tests.support.world import World

pytestmark = pytest.mark.parallel

LOGITS_TOLERANCE = 1e-5  # absolute
NUM_STEPS = 3

CASES: dict[str, tuple[Overrides, str]] = {
    "plain, TP=2, raw": (TP2, "raw"),
    "plain, TP=2, EMA": (TP2, "ema"),
    "RMSNorm SwiGLU GQA QK-norm tied, TP=2 SP": (
        LLAMA | TP2 | {"parallel.sequence_parallel": "true"},
        "raw",
    ),
    "RMSNorm SwiGLU GQA QK-norm tied, PP=2 interleaved": (LLAMA | INTERLEAVED, "ema"),
    "the same with wide heads, biases of queries, keys, values, scaled rope, TP=2 SP": (
        LLAMA | SCALED | TP2 | {"parallel.sequence_parallel": "true"},
        "ema",
    ),
    "gates, head bias, DP=2 distributed optimizer": (GATED | DISTRIBUTED, "raw"),
    "gates, head bias, PP=2": (GATED | PP2, "ema"),
}


@pytest.mark.parametrize("case", CASES)
def test_sampler_directory_has_the_megatron_models_logits(
    case: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    overrides, weights = CASES[case]
    run = tmp_path / "run"
    world.run(train_tiny, 2, run, tiny_data, overrides, NUM_STEPS)
    answers = world.run(compute_logits, 2, run, tiny_data, overrides, weights)[-1]
    *inputs, diffusion_EV, sequential_EV = answers
    convert(["to-sampler", str(run), str(tmp_path / "sampler"), "--weights", weights])
    model = EsoLM.from_pretrained(tmp_path / "sampler")
    worst = 0.0
    for phase, expected_EV in enumerate((diffusion_EV, sequential_EV)):
        x_0, is_masked, permutation = inputs[3 * phase : 3 * phase + 3]
        z = x_0.masked_fill(is_masked, model.config.mask_token_id)
        if phase == 0:
            logits_BTV = model.diffusion_logits(z, permutation)
        else:
            logits_BTV = model.sequential_logits(z, x_0, permutation)
        found_EV = logits_BTV[is_masked.gather(1, permutation)]
        difference = (found_EV - expected_EV[:, : found_EV.shape[1]]).abs().max()
        worst = max(worst, float(difference))
    spread = float(sequential_EV.std())
    print(f"{case}: logits differ by at most {worst:.1e}, their spread is {spread:.1e}")
    assert worst < LOGITS_TOLERANCE
    assert spread > 1000 * LOGITS_TOLERANCE


def test_conversion_gives_the_same_bytes_from_every_layout(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    first = world.run(train_tiny, 1, tmp_path / "a", tiny_data, {}, NUM_STEPS)[0]
    folders = []
    for number, overrides in enumerate((TP2, PP2)):
        run = tmp_path / str(number)
        (run / "checkpoints").mkdir(parents=True)
        (run / "checkpoints" / first.checkpoint.name).symlink_to(first.checkpoint)
        world.run(resave, 2, run, tiny_data, overrides, run / "again" / "checkpoints")
        folders.append(tmp_path / f"sampler_{number}")
        convert(["to-sampler", str(run / "again"), str(folders[-1]), "--weights", "raw"])
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == sorted(path.name for path in folders[1].iterdir())
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_weights_go_to_the_sampler_and_back(world: World, tiny_data: Path, tmp_path: Path) -> None:
    overrides = LLAMA | SCALED | TP2
    trained = world.run(train_tiny, 2, tmp_path / "run", tiny_data, overrides, NUM_STEPS)[0]
    convert(["to-sampler", str(tmp_path / "run"), str(tmp_path / "s"), "--weights", "raw"])
    convert(["to-megatron", str(tmp_path / "s"), str(tmp_path / "back")])
    convert(["verify", str(tmp_path / "back"), str(tmp_path / "s")])
    expected = read_checkpoint(trained.checkpoint)
    found = read_checkpoint(tmp_path / "back" / "checkpoints" / "step_00000000")
    vocab_size = EsoLM.from_pretrained(tmp_path / "s").config.vocab_size
    assert found
    for name, tensor in found.items():
        rows = vocab_size if "embedding" in name else len(tensor)
        assert torch.equal(tensor[:rows], expected[name][:rows]), name
        assert not tensor[rows:].any(), name
    # Training starts from it, on another layout.
    run = tmp_path / "continued"
    world.run(
        train_tiny, 2, run, tiny_data, LLAMA | SCALED | PP2 | start_from(tmp_path / "back"), 1
    )


def start_from(run: Path) -> Overrides:
    return {"checkpoint.init_from": f'"{run}"'}
