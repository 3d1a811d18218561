"""Scaled rotary frequencies are those of transformers and of Megatron-Core, bit for bit."""

import dataclasses

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_eso.config.model import ModelConfig
from megatron_eso.model.rotary import rotary_table, scale_frequencies
from megatron_eso.sampler.network import layers_eso_lm
from tests.support.networks import make_network_config

# Head width, base, factor, low and high limit, original length.
MODELS = {
    "Llama 3.1": (128, 500000, 8.0, 1.0, 4.0, 8192),
    "Llama 3.2": (64, 500000, 32.0, 1.0, 4.0, 8192),
    "limits of no released model": (12, 1000, 3.0, 0.25, 6.5, 100),
}
TABLE_TOLERANCE = 1e-4  # of angles up to 200 radians, in float32


@pytest.mark.parametrize("name", MODELS)
def test_scaled_frequencies_are_those_of_transformers_and_megatron(name: str) -> None:
    size, base, factor, low, high, length = MODELS[name]
    plain = 1.0 / (float(base) ** (torch.arange(0, size, 2).float() / size))
    scaling = {
        "rope_type": "llama3",
        "rope_theta": float(base),
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
    heads = {"hidden_size": 2 * size, "num_attention_heads": 2}
    llama = LlamaConfig(**heads, head_dim=size, rope_parameters=scaling)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](llama, device="cpu")
    # Training, then the sampler.
    keys = {
        "rope_scaling_factor": factor,
        "rope_low_freq_factor": low,
        "rope_high_freq_factor": high,
        "rope_original_length": length,
    }
    model = ModelConfig(num_layers=1, **heads, rotary_base=base, rope_scaling=True, **keys)
    assert torch.equal(scale_frequencies(plain, model), expected)
    rotary = {"head_dim": size, "rotary_base": float(base), "use_rope_scaling": True}
    network = make_network_config(**rotary, **keys)
    assert torch.equal(layers_eso_lm.scale_frequencies(network, plain), expected)
    # Megatron-Core fixes all but the factor.
    if (low, high, length) == (1.0, 4.0, 8192):
        embedding = RotaryEmbedding(
            size,
            rotary_percent=1.0,
            rotary_base=base,
            rope_scaling=True,
            rope_scaling_factor=factor,
            use_cpu_initialization=True,
        )
        assert torch.equal(embedding.inv_freq, expected)
    # Some frequencies are kept, some divided, some between; the tables have them.
    is_kept, is_divided = expected == plain, expected == plain / factor
    assert is_kept.any()
    assert is_divided.any()
    assert not (is_kept | is_divided).all()
    positions = torch.arange(200)
    table = rotary_table(positions, model)
    unscaled = rotary_table(positions, dataclasses.replace(model, rope_scaling=False))
    assert (table - unscaled).abs().max() > 100 * TABLE_TOLERANCE
    for half, whole in zip(
        table, layers_eso_lm.rotary_tables(network, positions[None]), strict=True
    ):
        torch.testing.assert_close(
            whole[0], torch.cat([half, half], -1), atol=TABLE_TOLERANCE, rtol=0
        )
