"""Describes networks of Llama, Qwen2 and Qwen3 by the sampler's fields, and back.

Source: `configuration_*.py` and `modeling_*.py` of these models in Hugging Face transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eso.errors import ConfigError
from megatron_eso.sampler.network.layers_eso_lm import NetworkConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What the models of one `model_type` have in common."""

    architecture: str
    add_qkv_bias: bool
    qk_layernorm: bool
    head_dim: int | None = None
    """Width of a head where `config.json` states none; None: hidden size / heads."""


FAMILIES = {
    "llama": Family(architecture="LlamaForCausalLM", add_qkv_bias=False, qk_layernorm=False),
    "qwen2": Family(architecture="Qwen2ForCausalLM", add_qkv_bias=True, qk_layernorm=False),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM", add_qkv_bias=False, qk_layernorm=True, head_dim=128
    ),
}
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
"""The only value of each key that the network implements, which is also the default."""
LLAMA3_FACTORS = {
    "factor": "rope_scaling_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_length",
}
"""The sampler's fields of the numbers of `rope_type` llama3."""
SAME_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "intermediate_size", "tie_word_embeddings"),
)
"""The fields that have one name in transformers and in the sampler."""
NORM_EPSILON = 1e-6
ROTARY_BASE = 10000.0
_FULL_ATTENTION = "full_attention"


def describe_hugging_face(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the fields of `NetworkConfig`, with a `vocab_size` that has no mask token yet.

    Args:
        config: The content of a `config.json` of transformers.
        path: The file, for errors.

    Raises:
        ConfigError: The model is of another architecture, or has a part that the network lacks.
    """
    # What no size states.
    family = _find_family(config, path)
    _check_fixed(config, path)
    # The sizes; a model with as many key heads as query heads need not state them.
    heads = _read(config, "num_attention_heads", int, path)
    hidden_size = _read(config, "hidden_size", int, path)
    width = family.head_dim or hidden_size // max(heads, 1)
    optional = {"num_key_value_heads": heads, "head_dim": width}
    optional = {key: value for key, value in optional.items() if config.get(key) is None}
    stated = {"rms_norm_eps": NORM_EPSILON, **config, **optional}
    sizes = ("num_hidden_layers", "num_key_value_heads", "head_dim", "intermediate_size")
    return {
        "vocab_size": _read(config, "vocab_size", int, path),
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        **{key: _read(stated, key, int, path) for key in sizes},
        "activation": "swiglu",
        "normalization": "RMSNorm",
        "norm_epsilon": _read(stated, "rms_norm_eps", float, path),
        **_describe_rotary(config, path),
        "add_bias_linear": False,
        "add_qkv_bias": family.add_qkv_bias,
        "qk_layernorm": family.qk_layernorm,
        "head_bias": False,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "max_length": _read(config, "max_position_embeddings", int, path),
    }


def describe_network(network: NetworkConfig, source: Path) -> dict[str, Any]:
    """Return the content of a `config.json` of transformers that describes a network.

    Args:
        network: The network; embedding and head of the result have its `vocab_size` rows.
        source: The sampler directory, for errors.

    Raises:
        ConfigError: No Llama, Qwen2 or Qwen3 has this shape.
    """
    # The parts that all families have, then the family.
    needed = {
        "activation": "swiglu",
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "head_bias": False,
    }
    for field, value in needed.items():
        if (found := getattr(network, field)) != value:
            raise ConfigError(
                f"{source}: {field} is {found!r}, {value!r} in Llama, Qwen2 and Qwen3; export a "
                "model of their shape"
            )
    parts = network.add_qkv_bias, network.qk_layernorm
    kinds = {(family.add_qkv_bias, family.qk_layernorm): kind for kind, family in FAMILIES.items()}
    if parts not in kinds:
        raise ConfigError(
            f"{source}: has add_qkv_bias and qk_layernorm, of which Qwen2 has the first and Qwen3 "
            "the second; export a model with one of them"
        )
    heads = network.num_attention_heads
    if kinds[parts] == "llama" and network.hidden_size % heads:
        raise ConfigError(
            f"{source}: hidden_size is {network.hidden_size}, in LlamaForCausalLM a multiple of "
            f"{heads} heads; export a model of its shape"
        )
    # Transformers 4 and 5 read these names of the rotary keys.
    scaling = {key: getattr(network, field) for key, field in LLAMA3_FACTORS.items()}
    return {
        "architectures": [FAMILIES[kinds[parts]].architecture],
        "model_type": kinds[parts],
        "hidden_act": FIXED["hidden_act"],
        **{key: getattr(network, key) for key in SAME_FIELDS},
        "max_position_embeddings": network.max_length,
        "rms_norm_eps": network.norm_epsilon,
        "rope_theta": network.rotary_base,
        "rope_scaling": {"rope_type": "llama3", **scaling} if network.use_rope_scaling else None,
    }


def _find_family(config: Mapping[str, Any], path: Path) -> Family:
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise ConfigError(f"{path}: model_type is {kind!r}; give a Llama, Qwen2 or Qwen3")
    stated = config.get("architectures") or [family.architecture]
    if stated != [family.architecture]:
        raise ConfigError(
            f"{path}: architectures is {stated!r}; give a model of {family.architecture}"
        )
    return family


def _check_fixed(config: Mapping[str, Any], path: Path) -> None:
    for key, value in FIXED.items():
        found = config.get(key)
        if found is not None and found != value:
            raise ConfigError(
                f"{path}: {key} is {found!r}; the network has only {value!r}, give another model"
            )
    other = sorted({str(kind) for kind in config.get("layer_types") or ()} - {_FULL_ATTENTION})
    if other:
        raise ConfigError(
            f"{path}: layer_types has {other[0]}; the network has only {_FULL_ATTENTION}, give "
            "another model"
        )


def _describe_rotary(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the rotary fields; transformers 5 keeps them in one entry, and 4 in two.

    Where both versions' entries are set, transformers takes `rope_scaling`.
    """
    rotary = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rotary = rotary if isinstance(rotary, dict) else {"rope_type": rotary}
    base = {"rope_theta": config.get("rope_theta", ROTARY_BASE), **rotary}
    fields: dict[str, Any] = {"rotary_base": _read(base, "rope_theta", float, path)}
    _check_fixed({"partial_rotary_factor": rotary.get("partial_rotary_factor")}, path)
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind == "default":
        return fields
    if kind != "llama3":
        raise ConfigError(
            f"{path}: rope_type is {kind!r}; the network scales rotary frequencies by llama3 or "
            "not at all, give another model"
        )
    for key, field in LLAMA3_FACTORS.items():
        fields[field] = _read(rotary, key, int if field.endswith("length") else float, path)
    return {**fields, "use_rope_scaling": True}


def _read(config: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    value: Any = config.get(key)
    is_number = type(value) is int or (kind is float and type(value) is float)
    if is_number and value > 0:
        return kind(value)
    raise ConfigError(
        f"{path}: {key} is {value!r}, not a positive number; give the config.json of transformers"
    )
