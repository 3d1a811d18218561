"""Small networks of every kind with random weights."""

import pytest
import torch

from megatron_eso.sampler import EsoLM
from megatron_eso.sampler.network.network_eso_lm import EsoNetwork
from tests.support.networks import make_network_config

KINDS = {
    "gelu": {},
    "swiglu_gqa_rms": {
        "activation": "swiglu",
        "normalization": "RMSNorm",
        "num_key_value_heads": 2,
        "add_bias_linear": False,
        "head_bias": False,
    },
    "wide_heads_qkv_bias_scaled_rope": {
        "head_dim": 8,
        "num_key_value_heads": 2,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "use_rope_scaling": True,
        "rope_low_freq_factor": 0.2,
        "rope_original_length": 40,
    },
    "tied_qk_norm_mqa": {
        "tie_word_embeddings": True,
        "qk_layernorm": True,
        "num_key_value_heads": 1,
    },
}


def make_model(
    dtype: torch.dtype = torch.float64, *, variant: str = "b", **changes: object
) -> EsoLM:
    network = EsoNetwork(make_network_config(**changes)).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for parameter in network.parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    description = {"variant": variant, "alpha_0": 0.25, "order": "left_to_right"}
    return EsoLM(network, {**description, "sequential_prediction": "own"})


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def model(request: pytest.FixtureRequest) -> EsoLM:
    return make_model(**request.param)


@pytest.fixture
def make():
    return make_model
