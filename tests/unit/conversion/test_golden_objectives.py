"""Networks of the other objectives equal the reference and Set Diffusion (golden/README.md)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints_conversion.__main__ import main
from megatron_eso.objectives.noise.orders import falling_keys, staggered_shape, staggered_times
from megatron_eso.sampler import load
from tests.support.golden_numbers import MASK, largest, nll_of

GOLDEN = Path(__file__).parents[2] / "golden"
BARE = GOLDEN / "tiny_set_weights.safetensors"
LOGITS_TOLERANCE = 1e-4
TOKEN_TOLERANCE = 1e-4
SUM_TOLERANCE = 1e-3
TIME_TOLERANCE = 1e-12
SETTINGS = range(5)
BLOCK_SIZES = (1, 4, 16, 48)


@pytest.fixture(scope="module")
def golden_sets() -> dict[str, Tensor]:
    return load_file(GOLDEN / "tiny_set.safetensors")


def convert(source: Path, out: Path, *options: str) -> Any:
    """Convert an official checkpoint, and open the result."""
    main(["from-official", str(source), str(out), *options])
    return load(out)


def convert_bare(out: Path, objective: str, *options: str) -> Any:
    shape = ("--num-heads", "4", "--length", "48")
    return convert(BARE, out, "--objective", objective, *shape, *options)


def test_variant_a_equals_the_reference_in_the_diffusion_phase(
    golden: dict[str, Tensor], tiny_ckpt: Path, tmp_path: Path
) -> None:
    model = convert(tiny_ckpt, tmp_path / "a", "--variant", "a")
    z_t, permutation = golden["a.diffusion.z_t"], golden["a.diffusion.permutation"]
    logits = model.diffusion_logits(z_t, permutation)
    assert largest(logits - golden["a.diffusion.logits"]) < LOGITS_TOLERANCE
    targets = golden["a.diffusion.x0"].gather(1, permutation)
    nll = nll_of(logits, targets) * (z_t.gather(1, permutation) == MASK)
    assert largest(nll - golden["a.diffusion.nll_low_var"]) < TOKEN_TOLERANCE
    assert largest(nll.sum(1) - golden["a.diffusion.nll_low_var"].sum(1)) < SUM_TOLERANCE


def test_variant_a_equals_the_reference_in_the_sequential_phase(
    golden: dict[str, Tensor], tiny_ckpt: Path, tmp_path: Path
) -> None:
    model = convert(tiny_ckpt, tmp_path / "a", "--variant", "a")
    z_0, permutation = golden["a.sequential.z_0"], golden["a.sequential.permutation"]
    x_0 = golden["a.diffusion.x0"]
    logits = model.sequential_logits(z_0, x_0, permutation)
    is_masked = z_0.gather(1, permutation) == MASK
    assert largest((logits - golden["a.sequential.logits"])[is_masked]) < LOGITS_TOLERANCE
    assert not logits[~is_masked].any()
    nll = nll_of(logits, x_0.gather(1, permutation)) * is_masked
    assert largest(nll - golden["a.sequential.nll"]) < TOKEN_TOLERANCE
    assert largest(nll.sum(1) - golden["a.sequential.nll"].sum(1)) < SUM_TOLERANCE


def test_mdlm_equals_the_reference(
    golden: dict[str, Tensor], tiny_ckpt: Path, tmp_path: Path
) -> None:
    model = convert(tiny_ckpt, tmp_path / "mdlm", "--objective", "mdlm")
    logits = model.diffusion_logits(golden["mdlm.z_t"])
    assert largest(logits - golden["mdlm.logits"]) < LOGITS_TOLERANCE


def test_ar_without_a_prepended_token_equals_the_reference(
    golden: dict[str, Tensor], tiny_ar_ckpt: Path, tmp_path: Path
) -> None:
    model = convert(tiny_ar_ckpt, tmp_path / "ar")
    assert model.description["prepend_token"] == "none"
    tokens = golden["ar.tokens"]
    assert largest(model.logits(tokens) - golden["ar.logits"]) < LOGITS_TOLERANCE
    expected = -nll_of(golden["ar.logits"][:, :-1], tokens[:, 1:])
    assert largest(model.token_log_likelihoods(tokens) - expected) < TOKEN_TOLERANCE


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_staggered_schedule_equals_set_diffusions(
    golden_sets: dict[str, Tensor], setting: int
) -> None:
    wanted = {
        name: golden_sets[f"staggered.{setting}.{name}"].numpy()
        for name in ("k_b", "loc", "exponential", "time", "order")
    }
    set_size, max_set_size = golden_sets["staggered.settings"][setting].tolist()
    shape = staggered_shape(set_size, max_set_size, 48)
    assert shape == pytest.approx(wanted["k_b"].tolist(), rel=1e-14)
    offsets = staggered_times(np.zeros(48), set_size, max_set_size)
    assert np.abs(offsets - wanted["loc"]).max() < TIME_TOLERANCE
    times = staggered_times(wanted["exponential"], set_size, max_set_size)
    assert np.abs(times - wanted["time"]).max() < TIME_TOLERANCE
    order = np.argsort(falling_keys(times), axis=-1, kind="stable")
    assert np.array_equal(order, wanted["order"])


@pytest.mark.parametrize("objective", ["set_dlm", "any_order_ar"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_set_diffusion_equals_its_code(
    golden_sets: dict[str, Tensor], tmp_path: Path, objective: str, setting: int
) -> None:
    model = convert_bare(tmp_path / "set", objective)
    x_0, order = golden_sets["x0"], golden_sets[f"staggered.{setting}.order"]
    logits = model.sequential_logits(torch.full_like(x_0, MASK), x_0, order)
    assert largest(logits - golden_sets[f"set_dlm.{setting}.logits"]) < LOGITS_TOLERANCE
    found, nll = model.token_log_likelihoods(x_0, order), golden_sets[f"set_dlm.{setting}.nll"]
    assert largest(found + nll) < TOKEN_TOLERANCE
    assert largest(found.sum(1) + nll.sum(1)) < SUM_TOLERANCE


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_bd3_lm_equals_its_code(
    golden_sets: dict[str, Tensor], tmp_path: Path, block_size: int
) -> None:
    model = convert_bare(tmp_path / "bd3", "bd3_lm", "--block-size", str(block_size))
    wanted = {n: golden_sets[f"bd3_lm.{block_size}.{n}"] for n in ("z_t", "logits", "nll")}
    x_0, is_masked = golden_sets["x0"], wanted["z_t"] == MASK
    logits = model.block_logits(wanted["z_t"], x_0)
    assert torch.equal(logits, model.block_logits(wanted["z_t"], x_0, block_size))
    assert largest((logits - wanted["logits"])[is_masked]) < LOGITS_TOLERANCE
    nll = nll_of(logits, x_0) * is_masked
    assert largest(nll - wanted["nll"]) < TOKEN_TOLERANCE
    assert largest(nll.sum(1) - wanted["nll"].sum(1)) < SUM_TOLERANCE
