"""Small networks with random weights, of every kind."""

import pytest
import torch

from megatron_eso.sampler import EsoLM
from megatron_eso.sampler.network_eso_lm import EsoNetwork, NetworkConfig

KINDS = {
    "gelu": {},
    "swiglu_gqa_rms": {
        "activation": "swiglu",
        "normalization": "RMSNorm",
        "num_key_value_heads": 2,
        "add_bias_linear": False,
        "head_bias": False,
    },
    "tied_qk_norm_mqa": {
        "tie_word_embeddings": True,
        "qk_layernorm": True,
        "num_key_value_heads": 1,
    },
}


def make_model(dtype: torch.dtype = torch.float64, **changes: object) -> EsoLM:
    values: dict[str, object] = {
        "vocab_size": 11,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "intermediate_size": 20,
        "activation": "gelu",
        "normalization": "LayerNorm",
        "norm_epsilon": 1e-5,
        "rotary_base": 10000.0,
        "add_bias_linear": True,
        "qk_layernorm": False,
        "head_bias": True,
        "tie_word_embeddings": False,
        "mask_token_id": 3,
        "max_length": 12,
    }
    config = NetworkConfig(**{**values, **changes})  # type: ignore[arg-type]
    network = EsoNetwork(config).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for parameter in network.parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return EsoLM(network, alpha_0=0.25)


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def model(request: pytest.FixtureRequest) -> EsoLM:
    return make_model(**request.param)


@pytest.fixture
def make():
    return make_model
