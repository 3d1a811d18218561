"""The converted network and the sampler equal the reference (golden/README.md)."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints_conversion.__main__ import main
from checkpoints_conversion.official import read_official
from megatron_eso.errors import CheckpointError
from megatron_eso.sampler import EsoLM
from tests.support.golden_numbers import MASK, largest, nll_of

LOGITS_TOLERANCE = 1e-4
SUM_TOLERANCE = 1e-3
TOKEN_TOLERANCE = 1e-4
ALPHA_0 = 0.25


def in_slot_order(tokens: Tensor, permutation: Tensor) -> Tensor:
    return tokens.gather(1, permutation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_diffusion_logits_equal_the_reference(
    golden: dict[str, Tensor], tiny_directory: Path, dtype: torch.dtype
) -> None:
    model = EsoLM.from_pretrained(tiny_directory, dtype=dtype)
    logits = model.diffusion_logits(golden["b.diffusion.z_t"], golden["b.diffusion.permutation"])
    assert logits.dtype == dtype
    assert largest(logits - golden["b.diffusion.logits"]) < LOGITS_TOLERANCE


def test_sequential_logits_equal_the_reference_on_masked_slots_and_are_zero_on_clean_ones(
    golden: dict[str, Tensor], tiny_model: EsoLM
) -> None:
    z_0, permutation = golden["b.sequential.z_0"], golden["b.sequential.permutation"]
    logits = tiny_model.sequential_logits(z_0, golden["b.diffusion.x0"], permutation)
    is_masked = in_slot_order(z_0, permutation) == MASK
    assert largest((logits - golden["b.sequential.logits"])[is_masked]) < LOGITS_TOLERANCE
    assert not logits[~is_masked].any()


def test_diffusion_losses_equal_the_reference(golden: dict[str, Tensor], tiny_model: EsoLM) -> None:
    z_t, permutation = golden["b.diffusion.z_t"], golden["b.diffusion.permutation"]
    is_masked = in_slot_order(z_t, permutation) == MASK
    targets = in_slot_order(golden["b.diffusion.x0"], permutation)
    nll = nll_of(tiny_model.diffusion_logits(z_t, permutation), targets) * is_masked
    alpha_t = ALPHA_0 * (1 - (1 - 1e-3) * golden["b.diffusion.t"].double())
    weight = ALPHA_0 * (1 - 1e-3) / (1 - alpha_t)
    for name, found in (("nll_low_var", nll), ("nll_elbo", nll * weight[:, None])):
        expected = golden[f"b.diffusion.{name}"]
        assert largest(found - expected) < TOKEN_TOLERANCE
        assert largest(found.sum(1) - expected.sum(1)) < SUM_TOLERANCE


def test_sequential_losses_equal_the_reference(
    golden: dict[str, Tensor], tiny_model: EsoLM
) -> None:
    z_0, permutation = golden["b.sequential.z_0"], golden["b.sequential.permutation"]
    x_0 = golden["b.diffusion.x0"]
    nll = nll_of(
        tiny_model.sequential_logits(z_0, x_0, permutation), in_slot_order(x_0, permutation)
    ) * (in_slot_order(z_0, permutation) == MASK)
    assert largest(nll - golden["b.sequential.nll"]) < TOKEN_TOLERANCE
    assert largest(nll.sum(1) - golden["b.sequential.nll"].sum(1)) < SUM_TOLERANCE


def test_any_order_log_likelihoods_equal_the_reference(
    golden: dict[str, Tensor], tiny_model: EsoLM
) -> None:
    x_0 = golden["b.diffusion.x0"]
    orders = golden["b.any_order.permutations"]
    found = [tiny_model.log_likelihood(x_0, order.expand_as(x_0).contiguous()) for order in orders]
    assert found[0].dtype == torch.float64
    expected = golden["b.any_order.log_likelihood"]
    assert largest(torch.stack(found, dim=1) - expected) < SUM_TOLERANCE


def test_sampled_tokens_equal_the_reference(golden: dict[str, Tensor], tiny_model: EsoLM) -> None:
    schedule = golden["b.sampler.schedule"].tolist()
    out = tiny_model.generate(
        2,
        schedule=schedule,
        permutation=golden["b.sampler.permutation"],
        gumbel=golden["b.sampler.gumbel"],
    )
    assert torch.equal(out.sequences, golden["b.sampler.tokens"])
    assert out.schedule == schedule
    assert out.nfe == len(schedule)


def test_sampler_logits_equal_the_reference(golden: dict[str, Tensor], tiny_model: EsoLM) -> None:
    seen = []
    network = tiny_model.network
    original = network.logits
    network.logits = lambda hidden: seen.append(original(hidden)) or seen[-1]  # type: ignore
    try:
        tiny_model.generate(
            2,
            schedule=golden["b.sampler.schedule"].tolist(),
            permutation=golden["b.sampler.permutation"],
            gumbel=golden["b.sampler.gumbel"],
        )
    finally:
        del network.logits
    # A step's rows are sorted by sample, then slot.
    by_step = [step.unflatten(0, (2, -1)) for step in seen]
    logits = torch.cat(by_step, dim=1)
    assert largest(logits - golden["b.sampler.logits"]) < LOGITS_TOLERANCE


def test_raw_weights_differ(golden: dict[str, Tensor], tiny_ckpt: Path, tmp_path: Path) -> None:
    main(["from-official", str(tiny_ckpt), str(tmp_path / "raw"), "--weights", "raw"])
    model = EsoLM.from_pretrained(tmp_path / "raw")
    logits = model.diffusion_logits(golden["b.diffusion.z_t"], golden["b.diffusion.permutation"])
    assert largest(logits - golden["b.diffusion.logits"]) > 100 * LOGITS_TOLERANCE


def test_the_mask_token_is_the_last_row_unless_it_is_given(
    tiny_ckpt: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main(["from-official", str(tiny_ckpt), str(tmp_path / "default")])
    assert "--mask-token-id" in caplog.text
    main(["from-official", str(tiny_ckpt), str(tmp_path / "fifth"), "--mask-token-id", "5"])
    assert EsoLM.from_pretrained(tmp_path / "default").config.mask_token_id == MASK
    assert EsoLM.from_pretrained(tmp_path / "fifth").config.mask_token_id == 5
    with pytest.raises(CheckpointError, match="mask-token-id 98; give one from 0 to 97"):
        main(["from-official", str(tiny_ckpt), str(tmp_path / "no"), "--mask-token-id", "98"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ckpt: ckpt.pop("ema"), "--weights raw"),
        (lambda ckpt: ckpt["ema"]["shadow_params"].pop(), "39 tensors for 40 parameters"),
        (lambda ckpt: ckpt["ema"]["shadow_params"].reverse(), "does not fit backbone.vocab_embed"),
        (lambda ckpt: ckpt["state_dict"].clear(), "vocab_embed.embedding"),
        (lambda ckpt: ckpt.pop("state_dict"), "no state_dict"),
        (lambda ckpt: drop_everywhere(ckpt, "backbone.blocks.1.norm1.weight"), "no tensor"),
        (lambda ckpt: drop_everywhere(ckpt, "backbone.blocks.0.mlp.0.weight"), "no tensor"),
        (lambda ckpt: drop_block(ckpt, 1), "has the blocks 0, 2; some are missing"),
        (lambda ckpt: add_everywhere(ckpt, "backbone.x", torch.zeros(1)), "x are unknown"),
        (lambda ckpt: reshape(ckpt, "vocab_embed.embedding", (-1,)), "do not fit each other"),
        (lambda ckpt: reshape(ckpt, "sigma_map.mlp.2.bias", (2, -1)), "do not fit each other"),
        (lambda ckpt: reshape(ckpt, "blocks.0.attn_qkv.weight", (-1, 3)), "in the weights"),
        (lambda ckpt: set_algorithm(ckpt, "diffusion_attn_mode", "mixed2"), "mixed2"),
        (lambda ckpt: set_algorithm(ckpt, "name", "duo"), "duo"),
        (lambda ckpt: set_algorithm(ckpt, "time_conditioning", True), "time_conditioning"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    tiny_ckpt: Path, tmp_path: Path, change, message: str
) -> None:
    official = read_official(tiny_ckpt)
    raw = read_official(tiny_ckpt, "raw")
    inv_freq = torch.zeros(official.head_dim // 2)
    checkpoint = {
        "state_dict": {
            **{f"backbone.{name}": tensor for name, tensor in raw.tensors.items()},
            "backbone.rotary_emb.inv_freq": inv_freq,
        },
        "ema": {"shadow_params": list(official.tensors.values())},
        "hyper_parameters": {"config": official.hyper_parameters},
        "global_step": 7,
    }
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    with pytest.raises(CheckpointError, match=message) as error:
        main(["from-official", str(tmp_path / "changed.ckpt"), str(tmp_path / "out")])
    assert str(error.value).startswith(f"{tmp_path / 'changed.ckpt'}: ")
    assert not (tmp_path / "out").exists()


def drop_everywhere(checkpoint: dict, name: str) -> None:
    place = list(checkpoint["state_dict"]).index(name)
    del checkpoint["state_dict"][name], checkpoint["ema"]["shadow_params"][place]


def drop_block(checkpoint: dict, block: int) -> None:
    for name in list(checkpoint["state_dict"]):
        if name.startswith(f"backbone.blocks.{block}."):
            drop_everywhere(checkpoint, name)


def add_everywhere(checkpoint: dict, name: str, tensor: Tensor) -> None:
    checkpoint["state_dict"][name] = tensor
    # The rotary frequencies before it are not parameters, so the EMA list has none for them.
    checkpoint["ema"]["shadow_params"].append(tensor)


def reshape(checkpoint: dict, name: str, shape: tuple[int, ...]) -> None:
    state, shadow = checkpoint["state_dict"], checkpoint["ema"]["shadow_params"]
    place = list(state).index(f"backbone.{name}")
    state[f"backbone.{name}"] = state[f"backbone.{name}"].reshape(shape)
    shadow[place] = shadow[place].reshape(shape)


def set_algorithm(checkpoint: dict, key: str, value: object) -> None:
    checkpoint["hyper_parameters"]["config"]["algo"][key] = value
