"""The reference's numbers from the Megatron model on every layout, by an imported checkpoint."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from checkpoints_conversion.__main__ import main as convert
from tests.ranks.network import compute_losses
from tests.support.training import LAYOUTS
from tests.support.world import World

pytestmark = pytest.mark.parallel

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NLL_TOLERANCE = 1e-4  # absolute, nats per token


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
