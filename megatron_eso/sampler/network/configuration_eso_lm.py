"""The configuration of a sampler directory for Hugging Face transformers."""

from typing import Any

from transformers import PretrainedConfig


class EsoLMConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Hyper-parameters of the network, as `layers_eso_lm.NetworkConfig` has them, and objective."""

    model_type = "eso_lm"

    def __init__(  # noqa: PLR0913 - transformers gives each key of config.json by name
        self,
        *,
        vocab_size: int = 2,
        hidden_size: int = 64,
        num_hidden_layers: int = 1,
        num_attention_heads: int = 1,
        num_key_value_heads: int = 1,
        head_dim: int = 64,
        intermediate_size: int = 256,
        activation: str = "gelu",
        normalization: str = "LayerNorm",
        norm_epsilon: float = 1e-5,
        rotary_base: float = 10000.0,
        use_rope_scaling: bool = False,
        rope_scaling_factor: float = 8.0,
        rope_low_freq_factor: float = 1.0,
        rope_high_freq_factor: float = 4.0,
        rope_original_length: int = 8192,
        add_bias_linear: bool = True,
        add_qkv_bias: bool = False,
        qk_layernorm: bool = False,
        head_bias: bool = False,
        tie_word_embeddings: bool = False,
        mask_token_id: int = 1,
        max_length: int = 1024,
        objective: str = "eso_lm",
        variant: str = "b",
        sequential_prediction: str = "own",
        block_size: int = 1,
        prepend_token: str = "mask",
        **kwargs: Any,
    ) -> None:
        """Keep the fields of network and objective, and pass the others to transformers."""
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)
        # The network.
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads, self.head_dim = num_attention_heads, head_dim
        self.num_key_value_heads = num_key_value_heads
        self.intermediate_size = intermediate_size
        self.activation = activation
        self.normalization, self.norm_epsilon = normalization, norm_epsilon
        self.rotary_base = rotary_base
        self.use_rope_scaling = use_rope_scaling
        self.rope_scaling_factor = rope_scaling_factor
        self.rope_low_freq_factor = rope_low_freq_factor
        self.rope_high_freq_factor = rope_high_freq_factor
        self.rope_original_length = rope_original_length
        self.add_bias_linear = add_bias_linear
        self.add_qkv_bias = add_qkv_bias
        self.qk_layernorm = qk_layernorm
        self.head_bias = head_bias
        self.mask_token_id = mask_token_id
        self.max_length = max_length
        # The objective.
        self.objective, self.variant = objective, variant
        self.sequential_prediction = sequential_prediction
        self.block_size, self.prepend_token = block_size, prepend_token

    def _get_generation_parameters(self) -> dict[str, Any]:
        """Return no parameter: transformers would use `max_length` for its own generation."""
        return {}

    def _get_non_default_generation_parameters(self) -> dict[str, Any]:
        """Return no parameter, under the name of transformers 4."""
        return {}
