"""Small configurations of the sampler's network."""

from megatron_eso.sampler.network.layers_eso_lm import NetworkConfig

VALUES: dict[str, object] = {
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


def make_network_config(**changes: object) -> NetworkConfig:
    """Make a GELU, LayerNorm network of two layers, except for `changes`."""
    return NetworkConfig(**{**VALUES, **changes})  # type: ignore[arg-type]
