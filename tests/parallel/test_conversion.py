"""Converted directories hold the network that was trained: logits, bytes and the way back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoints_conversion.__main__ import main as convert
from megatron_eso.sampler import EsoLM
from tests.parallel.test_resume import resave
from tests.support.training import (
    DISTRIBUTED,
    INTERLEAVED,
    PP2,
    TP2,
    Overrides,
    open_batches,
    read_checkpoint,
    train_tiny,
)
from tests.support.world import World

pytestmark = pytest.mark.parallel

LOGITS_TOLERANCE = 1e-5  # absolute
NUM_STEPS = 3

LLAMA: Overrides = {
    "model.normalization": '"RMSNorm"',
    "model.activation": '"swiglu"',
    "model.num_query_groups": 2,
    "model.qk_layernorm": "true",
    "model.add_bias_linear": "false",
    "model.share_embeddings_and_output_weights": "true",
    "model.rotary_base": 500,
}
GATED: Overrides = {
    "model.residual_gates": "true",
    "model.zero_init_head": "true",
    "model.head_bias": "true",
}
CASES: dict[str, tuple[Overrides, str]] = {
    "plain, TP=2, raw": (TP2, "raw"),
    "plain, TP=2, EMA": (TP2, "ema"),
    "RMSNorm SwiGLU GQA QK-norm tied, TP=2 SP": (
        LLAMA | TP2 | {"parallel.sequence_parallel": "true"},
        "raw",
    ),
    "RMSNorm SwiGLU GQA QK-norm tied, PP=2 interleaved": (LLAMA | INTERLEAVED, "ema"),
    "gates, head bias, DP=2 distributed optimizer": (GATED | DISTRIBUTED, "raw"),
    "gates, head bias, PP=2": (GATED | PP2, "ema"),
}


def compute_logits(run: Path, data: Path, overrides: Overrides, weights: str) -> list[Tensor]:
    """Inputs, orders and the Megatron model's logits of loss rows, diffusion then sequential.

    Returns:
        On the last pipeline stage x_0, is_masked, permutation of each phase and its logits [E, V].
    """
    from contextlib import nullcontext

    from megatron_eso.training.distributed.cpu_backend import install_cpu_backend

    install_cpu_backend()
    from megatron.core.utils import unwrap_model

    from megatron_eso.data.shards.reader import TokenDataset
    from megatron_eso.objectives.noise import draw_noise
    from megatron_eso.objectives.schedule import LogLinearSchedule
    from megatron_eso.training.checkpointing.checkpoints import Checkpoints
    from megatron_eso.training.checkpointing.restore import restore
    from megatron_eso.training.distributed.parallel import model_parallel_groups
    from megatron_eso.training.steps.batches import row_multiple
    from megatron_eso.training.steps.evaluation import for_evaluation
    from megatron_eso.training.steps.step import run_schedule
    from megatron_eso.training.steps.train_state import build_train_state
    from tests.support.planning import eso_lm, plan_noise
    from tests.support.training import tiny_config

    config = tiny_config(run, data, overrides)
    dataset = TokenDataset.open(data / "train")
    length, alpha_0 = config.data.sequence_length, config.objective.alpha_0
    answers: list[Tensor] = []
    micro_batches = []
    for is_sequential in (False, True):
        indices = np.arange(4)
        x_0 = dataset.rows(indices, length)
        times = np.array([0.1, 0.4, 0.7, 1.0])
        noise = draw_noise(
            7, indices, np.full(4, is_sequential), times, LogLinearSchedule(alpha_0), length
        )
        objective = eso_lm(dataset.mask_token_id, alpha_0=alpha_0)
        micro_batches.append(
            plan_noise(objective, x_0, noise, row_multiple=row_multiple(config.parallel))
        )
        answers += map(torch.from_numpy, (x_0, noise.is_masked_BT, noise.permutation_BT))

    with model_parallel_groups(config.parallel) as groups:
        batches = open_batches(config, groups)
        state = build_train_state(config, groups)
        restore(state, config, Checkpoints(run / "checkpoints", config.checkpoint, batches))
        captured: list[Tensor] = []
        head = unwrap_model(state.chunks[-1])
        if head.post_process:
            head.output_layer.register_forward_hook(
                lambda _module, _inputs, output: captured.append(output[0].detach().clone())
            )

        def step(iterator, model):  # type: ignore[no-untyped-def]
            batch = next(iterator)
            return model(batch.rows, batch.loss.targets_E), lambda nll_E: (nll_E.sum(), nll_E)

        assert state.ema is not None
        average = state.ema.applied(state.chunks, state.optimizer)
        with (
            torch.no_grad(),
            for_evaluation(state.chunks),
            average if weights == "ema" else nullcontext(),
        ):
            run_schedule(step, state, micro_batches, groups, forward_only=True)
        for logits, micro_batch in zip(captured, micro_batches, strict=False):
            parts = [torch.empty_like(logits) for _ in range(groups.tp.size())]
            torch.distributed.all_gather(parts, logits.contiguous(), group=groups.tp)
            answers.append(torch.cat(parts, dim=-1)[: micro_batch.loss.num_real, 0])
    return answers


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
    overrides = LLAMA | TP2
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
    world.run(train_tiny, 2, run, tiny_data, LLAMA | PP2 | start_from(tmp_path / "back"), 1)


def start_from(run: Path) -> Overrides:
    return {"checkpoint.init_from": f'"{run}"'}
