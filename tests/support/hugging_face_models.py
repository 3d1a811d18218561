"""Small models of transformers: Llama, Qwen2 and Qwen3, of drawn weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
# Of its frequencies some are kept, some divided, and one is between.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TIED = {"tie_word_embeddings": True}
# The family, and the changes of `SIZES`.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", TIED),
    "llama 3.1, wide heads": ("llama", {"head_dim": 12, "rope_parameters": LLAMA3}),
    "llama, one key head, tied": ("llama", {"num_key_value_heads": 1, **TIED}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2, tied": ("qwen2", TIED),
    "qwen3": ("qwen3", {"head_dim": 10}),
    "qwen3, tied": ("qwen3", {"head_dim": 6, "num_key_value_heads": 4, **TIED}),
}


def make_model(name: str, **changes: Any) -> PreTrainedModel:
    """Make a model of `MODELS`; no weight has a special value."""
    family, values = MODELS[name]
    config_class, model_class = CLASSES[family]
    torch.manual_seed(3)
    model: PreTrainedModel = model_class(config_class(**{**SIZES, **values, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def save_model(directory: Path, name: str = "llama", **changes: Any) -> PreTrainedModel:
    """Write a model of `MODELS` as transformers does, and return it."""
    model = make_model(name, **changes)
    model.save_pretrained(directory)
    return model
