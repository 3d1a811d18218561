"""Logits of each objective's next step, by a full forward pass without any cache."""

import torch
from torch import Tensor

from megatron_eso.sampler.network.network_eso_lm import EsoNetwork
from megatron_eso.sampler.objectives.ar import AR
from megatron_eso.sampler.objectives.bd3_lm import BD3LM
from megatron_eso.sampler.objectives.build import MODELS
from megatron_eso.sampler.objectives.eso_lm import EsoLM
from megatron_eso.sampler.objectives.mdlm import MDLM
from megatron_eso.sampler.objectives.model import SamplerModel
from tests.support.networks import make_network_config

ESO_LM: dict[str, object] = {
    "objective": "eso_lm",
    "variant": "b",
    "alpha_0": 0.5,
    "sequential_prediction": "own",
    "order": "left_to_right",
}
CASES: dict[str, dict[str, object]] = {
    "eso_lm_b": ESO_LM,
    "eso_lm_next": ESO_LM | {"sequential_prediction": "next"},
    "eso_lm_a": ESO_LM | {"variant": "a"},
    "mdlm": {"objective": "mdlm"},
    "ar_mask": {"objective": "ar", "prepend_token": "mask", "bos_token_id": None},
    "ar_bos": {"objective": "ar", "prepend_token": "bos", "bos_token_id": 1},
    "ar_none": {"objective": "ar", "prepend_token": "none", "bos_token_id": None},
    "bd3_lm": {"objective": "bd3_lm", "block_size": 3},
    "set_dlm": {"objective": "set_dlm", "order": "staggered", "set_size": 2, "max_set_size": 4},
    "any_order_ar": {"objective": "any_order_ar", "order": "uniform"},
}
"""The objectives' entries of `config.json`."""


def make_sampler(case: str, dtype: torch.dtype = torch.float64, **changes: object) -> SamplerModel:
    """Make a model of one of the cases with random weights; `changes` are of the network."""
    network = EsoNetwork(make_network_config(**changes)).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for parameter in network.parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    description = CASES[case]
    return MODELS[str(description["objective"])](network, description)


def recompute(model: SamplerModel, tokens: Tensor, order: Tensor, num_random: int) -> Tensor:
    """Compute the logits of the masked slots of a step, `[B, T, V]` in slot order.

    Args:
        model: The model.
        tokens: Texts in natural order, int64 `[B, T]`; all have as many known tokens.
        order: Their orders, int64 `[B, T]`; known positions come first.
        num_random: Slots before the sequential phase (Eso-LM).
    """
    if isinstance(model, AR):
        natural = model.network.next_token_logits(tokens, model.prepended)
        if model.prepended is None:
            natural = torch.cat([torch.zeros_like(natural[:, :1]), natural], dim=1)
        return natural[:, :-1]
    if isinstance(model, BD3LM):
        natural = model.block_logits(tokens, tokens)
    elif isinstance(model, MDLM):
        natural = model.diffusion_logits(tokens)
    elif not isinstance(model, EsoLM):
        return model.network.set_logits(tokens, order)
    else:
        return recompute_eso_lm(model, tokens, order, num_random)
    return natural.gather(1, order[:, :, None].expand_as(natural))


def recompute_eso_lm(model: EsoLM, tokens: Tensor, order: Tensor, num_random: int) -> Tensor:
    """Compute the same for an Eso-LM, whose sequential phase may have rows of another kind."""
    num_clean = int((tokens[0] != model.config.mask_token_id).sum())
    has_other_rows = model.has_two_way_prefix or model.predicts_next
    if not has_other_rows or num_clean < num_random:
        return model.diffusion_logits(tokens, order)
    later = order[:, num_random:]
    z_0 = tokens.scatter(1, later, model.config.mask_token_id)
    # The tokens after the current slot are read by no earlier one.
    x_0 = tokens.where(tokens != model.config.mask_token_id, 0)
    return model.sequential_logits(z_0, x_0, order)


def record_logits(model: SamplerModel) -> list[Tensor]:
    """Collect the logits that the network computes."""
    seen: list[Tensor] = []
    original = model.network.logits
    model.network.logits = lambda hidden: seen.append(original(hidden)) or seen[-1]  # type: ignore
    return seen
