"""Checkpoints of training through `to-sampler`: the Megatron model's logits, on any layout."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoints_conversion.__main__ import main
from megatron_eso.sampler import EsoLM
from tests.support.training import PP2, TP2, Overrides, train_tiny
from tests.support.world import World

pytestmark = pytest.mark.parallel

LOGITS_TOLERANCE = 1e-5
NUM_STEPS = 2
LENGTH = 24
NUM_CLEAN = (0, 1, 9, 23)

MODELS: dict[str, Overrides] = {
    "gelu, gates, head bias": {"model.residual_gates": "true", "model.head_bias": "true"},
    "swiglu, grouped queries, RMS, QK norm, tied": {
        "model.activation": '"swiglu"',
        "model.num_query_groups": 2,
        "model.normalization": '"RMSNorm"',
        "model.qk_layernorm": "true",
        "model.add_bias_linear": "false",
        "model.share_embeddings_and_output_weights": "true",
    },
}


def draw_probe(vocab_size: int, mask_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Texts, orders, and which positions are masked."""
    generator = torch.Generator().manual_seed(3)
    shape = (len(NUM_CLEAN), LENGTH)
    x = torch.randint(0, vocab_size, shape, generator=generator)
    x[x == mask_token_id] = 0
    order = torch.rand(shape, generator=generator).argsort(1)
    is_masked_slot = torch.arange(LENGTH) >= torch.tensor(NUM_CLEAN)[:, None]
    return x, order, torch.zeros(shape, dtype=torch.bool).scatter(1, order, is_masked_slot)


def compute_logits(run: Path, data: Path, overrides: Overrides) -> tuple[int, int, list[Tensor]]:
    """Vocabulary size, mask token, and the Megatron model's logits of masked slots, by phase."""
    from megatron_eso.training.cpu_backend import install_cpu_backend

    install_cpu_backend()
    from megatron_eso.data.batches import TrainingBatches
    from megatron_eso.data.reader import TokenDataset
    from megatron_eso.diffusion.noise import Noise
    from megatron_eso.diffusion.rows import plan_rows
    from megatron_eso.diffusion.schedule import LogLinearSchedule
    from megatron_eso.training.checkpoint import Checkpoints, restore
    from megatron_eso.training.parallel import model_parallel_groups
    from megatron_eso.training.train_state import build_train_state
    from tests.support.training import tiny_config

    config = tiny_config(run, data, overrides)
    vocab_size, mask_token_id = config.data.vocab_size, config.data.mask_token_id
    assert vocab_size is not None
    assert mask_token_id is not None
    x, order, is_masked = draw_probe(vocab_size, mask_token_id)
    logits = []
    with model_parallel_groups(config.parallel) as groups:
        batches = TrainingBatches(config, TokenDataset.open(data / "train"), groups.dp.size())
        state = build_train_state(config, groups)
        restore(state, config, Checkpoints(run / "checkpoints", 1, batches.identity))
        model = state.chunks[0].module.eval()
        original = model.compute_logits

        def keep(hidden: Tensor) -> Tensor:
            found = original(hidden)
            logits.append(found[:, 0, :vocab_size].detach().clone())
            return found

        model.compute_logits = keep
        for is_sequential in (False, True):
            noise = Noise(
                is_masked_BT=is_masked.numpy(),
                permutation_BT=order.numpy(),
                t_B=np.full(len(NUM_CLEAN), np.nan if is_sequential else 0.5),
                is_sequential_B=np.full(len(NUM_CLEAN), is_sequential),
            )
            plan = plan_rows(
                x,
                noise,
                schedule=LogLinearSchedule(config.objective.alpha_0),
                loss_type="elbo",
                mask_token_id=mask_token_id,
                row_multiple=1,
            )
            with torch.no_grad():
                model(plan)
            logits[-1] = logits[-1][: plan.num_loss_rows]
    return vocab_size, mask_token_id, logits


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_directory_is_the_megatron_model(
    name: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    overrides = MODELS[name]
    run = tmp_path / "run"
    world.run(train_tiny, 2, run, tiny_data, overrides | TP2, NUM_STEPS)
    vocab_size, mask_token_id, logits = world.run(compute_logits, 1, run, tiny_data, overrides)[0]
    main(["to-sampler", str(run), str(tmp_path / "raw"), "--weights", "raw"])
    main(["to-sampler", str(run), str(tmp_path / "ema")])
    x, order, is_masked = draw_probe(vocab_size, mask_token_id)
    z = x.masked_fill(is_masked, mask_token_id)
    is_masked_slot = is_masked.gather(1, order)
    raw, ema = (EsoLM.from_pretrained(tmp_path / weights) for weights in ("raw", "ema"))
    for model, is_same in ((raw, True), (ema, False)):
        found = (
            model.diffusion_logits(z, order)[is_masked_slot],
            model.sequential_logits(z, x, order)[is_masked_slot],
        )
        for ours, theirs in zip(found, logits, strict=True):
            is_token = torch.arange(vocab_size) != mask_token_id
            difference = float((ours - theirs)[:, is_token].abs().max())
            print(f"{name}: logits differ by {difference:.1e}")
            assert (difference < LOGITS_TOLERANCE) == is_same


def resave(run: Path, data: Path, overrides: Overrides, to: Path) -> None:
    """Load the run's newest checkpoint on this layout and write it to another folder."""
    from megatron_eso.training.cpu_backend import install_cpu_backend

    install_cpu_backend()
    from megatron_eso.data.batches import TrainingBatches
    from megatron_eso.data.reader import TokenDataset
    from megatron_eso.training.checkpoint import Checkpoints, restore
    from megatron_eso.training.parallel import model_parallel_groups
    from megatron_eso.training.train_state import build_train_state
    from tests.support.training import tiny_config

    config = tiny_config(run, data, overrides)
    with model_parallel_groups(config.parallel) as groups:
        batches = TrainingBatches(config, TokenDataset.open(data / "train"), groups.dp.size())
        state = build_train_state(config, groups)
        restore(state, config, Checkpoints(run / "checkpoints", 1, batches.identity))
        Checkpoints(to / "checkpoints", 1, batches.identity).save(state, config, groups)


def test_a_checkpoint_saved_again_on_another_layout_converts_to_identical_bytes(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    model = MODELS["gelu, gates, head bias"]
    world.run(train_tiny, 1, tmp_path / "one", tiny_data, model, NUM_STEPS)
    for name, layout in (("tp", TP2), ("pp", PP2)):
        world.run(resave, 2, tmp_path / "one", tiny_data, model | layout, tmp_path / name)
    digests = []
    for name in ("one", "tp", "pp"):
        for weights in ("ema", "raw"):
            out = tmp_path / f"{name}-{weights}"
            main(["to-sampler", str(tmp_path / name), str(out), "--weights", weights])
        digests.append(
            {
                f"{weights}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
                for weights in ("ema", "raw")
                for path in sorted((tmp_path / f"{name}-{weights}").iterdir())
            }
        )
        shutil.rmtree(tmp_path / f"{name}-ema")
    assert digests[0] == digests[1] == digests[2]
    assert main(["verify", str(tmp_path / "tp-raw"), str(tmp_path / "pp")]) == 0
