"""The reference's numbers from the Megatron model on every layout, by an imported checkpoint."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints_conversion.__main__ import main as convert
from tests.support.training import LAYOUTS, Overrides
from tests.support.world import World

pytestmark = pytest.mark.parallel

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NLL_TOLERANCE = 1e-4  # absolute, nats per token
ALPHA_0 = 0.25


def compute_losses(run: Path, overrides: Overrides, golden: dict[str, Tensor]) -> list[Tensor]:
    """Per-token losses of both phases as the Megatron model gives them, without weights."""
    from megatron_eso.training.distributed.cpu_backend import install_cpu_backend

    install_cpu_backend()
    from megatron_eso.config.loading import read_config
    from megatron_eso.config.sections import ParallelConfig
    from megatron_eso.objectives.noise import Noise
    from megatron_eso.training.checkpointing.checkpoints import Checkpoints
    from megatron_eso.training.checkpointing.restore import restore
    from megatron_eso.training.distributed.parallel import model_parallel_groups
    from megatron_eso.training.steps.batches import row_multiple
    from megatron_eso.training.steps.step import run_schedule
    from megatron_eso.training.steps.train_state import build_train_state
    from tests.support.planning import eso_lm, plan_noise

    config = read_config(run / "config.json")
    keys = {key.removeprefix("parallel."): value for key, value in overrides.items()}
    values = {key: {"true": True, "false": False}.get(value, value) for key, value in keys.items()}
    # The reference's network has three layers.
    if "virtual_pipeline_model_parallel_size" in values:
        values["pipeline_model_parallel_layout"] = "Et|t|t|L"
    elif "pipeline_model_parallel_size" in values:
        values["pipeline_model_parallel_layout"] = "Ett|tL"
    config = dataclasses.replace(config, parallel=ParallelConfig(**values))
    mask_token_id = config.data.mask_token_id
    assert mask_token_id is not None
    micro_batches = []
    for phase, masked in (("diffusion", "z_t"), ("sequential", "z_0")):
        is_masked = (golden[f"b.{phase}.{masked}"] == mask_token_id).numpy()
        is_sequential = np.full(len(is_masked), phase == "sequential")
        times = golden["b.diffusion.t"].double().numpy()
        noise = Noise(
            length_B=np.full(len(is_masked), is_masked.shape[1]),
            is_masked_BT=is_masked,
            permutation_BT=golden[f"b.{phase}.permutation"].numpy(),
            t_B=np.where(is_sequential, np.nan, times),
            is_sequential_B=is_sequential,
        )
        objective = eso_lm(mask_token_id, alpha_0=ALPHA_0)
        x_0, multiple = golden["b.diffusion.x0"].numpy(), row_multiple(config.parallel)
        micro_batches.append(plan_noise(objective, x_0, noise, row_multiple=multiple))

    def step(iterator, model):  # type: ignore[no-untyped-def]
        batch = next(iterator)
        nll = model(batch.rows, batch.loss.targets_E)
        return nll, lambda nll_E: (nll_E.sum(), nll_E[: batch.loss.num_real])

    with model_parallel_groups(config.parallel) as groups:
        state = build_train_state(config, groups)
        restore(state, config, Checkpoints(run / "checkpoints", config.checkpoint, {}))
        for chunk in state.chunks:
            chunk.eval()
        with torch.no_grad():
            return run_schedule(step, state, micro_batches, groups, forward_only=True)


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    convert(["from-official", str(GOLDEN / "tiny.ckpt"), str(folder / "sampler")])
    convert(["to-megatron", str(folder / "sampler"), str(folder / "run")])
    return folder / "run"


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "DP" not in name])
def test_losses_per_token_equal_the_references(
    layout: str, run_directory: Path, world: World
) -> None:
    golden = load_file(GOLDEN / "tiny.safetensors")
    num_ranks, overrides = LAYOUTS[layout]
    results = world.run(compute_losses, num_ranks, run_directory, overrides, golden)
    diffusion, sequential = results[-1]
    worst = 0.0
    for found, name in ((diffusion, "diffusion.nll_low_var"), (sequential, "sequential.nll")):
        expected = golden[f"b.{name}"]
        masked = golden["b.diffusion.z_t" if "diff" in name else "b.sequential.z_0"] == 97
        permutation = golden[f"b.{name.split('.')[0]}.permutation"]
        is_masked_slot = masked.gather(1, permutation)
        difference = (found - expected[is_masked_slot]).abs().max()
        worst = max(worst, float(difference))
        assert difference < NLL_TOLERANCE
    print(f"{layout}: per-token losses differ from the reference's by at most {worst:.1e}")
