"""Maps the keys of a run's configuration to the fields of a sampler's `config.json`, and back.

Two functions apply one table. A new key of the model that changes what the network computes is one
line here, one field of `NetworkConfig`, and one parameter of `EsoLMConfig`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_eso.config.keys import describe_keys
from megatron_eso.config.model import ModelConfig
from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.config.sections import (
    Config,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from megatron_eso.errors import CheckpointError
from megatron_eso.sampler.network.layers_eso_lm import NetworkConfig
from megatron_eso.sampler.network.objective_fields import OBJECTIVE_FIELDS


def keep(value: Any) -> Any:
    """Return the value as it is."""
    return value


def as_rotary_base(value: float) -> int:
    """Return the rotary base as a whole number, which a run's configuration needs.

    Raises:
        CheckpointError: The base is not a whole number.
    """
    if not value.is_integer():
        raise CheckpointError(f"rotary_base {value} is not a whole number, as a run needs it")
    return int(value)


@dataclass(frozen=True, slots=True)
class SharedField:
    """A value that both configurations have."""

    path: str
    """`section.name` in a run's configuration."""
    field: str
    """Name in `NetworkConfig` and in `config.json`."""
    to_network: Callable[[Any], Any] = keep
    """Converts the run's value to the network's."""
    to_run: Callable[[Any], Any] = keep
    """Converts the network's value to the run's."""


SHARED_FIELDS = (
    SharedField("data.vocab_size", "vocab_size"),
    SharedField("data.mask_token_id", "mask_token_id"),
    SharedField("data.sequence_length", "max_length"),
    SharedField("model.num_layers", "num_hidden_layers"),
    SharedField("model.hidden_size", "hidden_size"),
    SharedField("model.num_attention_heads", "num_attention_heads"),
    SharedField("model.num_query_groups", "num_key_value_heads"),
    SharedField("model.kv_channels", "head_dim"),
    SharedField("model.ffn_hidden_size", "intermediate_size"),
    SharedField("model.normalization", "normalization"),
    SharedField("model.norm_epsilon", "norm_epsilon"),
    SharedField("model.activation", "activation"),
    SharedField("model.rotary_base", "rotary_base", float, as_rotary_base),
    SharedField("model.rope_scaling", "use_rope_scaling"),
    SharedField("model.rope_scaling_factor", "rope_scaling_factor", float, float),
    SharedField("model.rope_low_freq_factor", "rope_low_freq_factor", float, float),
    SharedField("model.rope_high_freq_factor", "rope_high_freq_factor", float, float),
    SharedField("model.rope_original_length", "rope_original_length"),
    SharedField("model.qk_layernorm", "qk_layernorm"),
    SharedField("model.add_bias_linear", "add_bias_linear"),
    SharedField("model.add_qkv_bias", "add_qkv_bias"),
    SharedField("model.share_embeddings_and_output_weights", "tie_word_embeddings"),
    SharedField("model.head_bias", "head_bias"),
)


def describe_network(config: Config, source: object) -> NetworkConfig:
    """Return the network that a run's configuration describes.

    Args:
        config: The run's configuration.
        source: The file that it was read from, for errors.

    Raises:
        CheckpointError: The configuration does not state the vocabulary.
    """
    if config.data.vocab_size is None or config.data.mask_token_id is None:
        raise CheckpointError(
            f"{source}: data.vocab_size and data.mask_token_id are not set; give a checkpoint of "
            "this version"
        )
    return NetworkConfig(
        **{shared.field: shared.to_network(config.get(shared.path)) for shared in SHARED_FIELDS}
    )


def list_objective_keys(name: str) -> list[str]:
    """List the fields of an objective in `config.json` that are keys of a run too."""
    keys = {key.name: key for key in describe_keys("objective", ObjectiveConfig)}
    return [
        field for field in OBJECTIVE_FIELDS[name] if field in keys and keys[field].belongs_to(name)
    ]


def describe_objective(config: Config) -> dict[str, Any]:
    """Return the entries of `config.json` that describe a run's objective."""
    name = config.objective.name
    values = {field: getattr(config.objective, field) for field in list_objective_keys(name)}
    if values.get("prepend_token") == "bos":
        values["bos_token_id"] = config.data.bos_token_id
    return {"objective": name, **values}


def build_run_config(
    network: NetworkConfig, description: Mapping[str, Any], directory: str
) -> Config:
    """Describe a network by a run's configuration, whose values for training are placeholders.

    Args:
        network: The network to describe.
        description: The content of a sampler's `config.json`, which states the objective.
        directory: The run directory.

    Raises:
        CheckpointError: Megatron-Core has no such network.
    """
    values: dict[str, dict[str, Any]] = {"data": {}, "model": {}}
    for shared in SHARED_FIELDS:
        section, _, name = shared.path.partition(".")
        values[section][name] = shared.to_run(getattr(network, shared.field))
    name = description.get("objective", "eso_lm")
    keys = list_objective_keys(name)
    objective = {key: description[key] for key in keys if description.get(key) is not None}
    bos_token_id = description.get("bos_token_id")
    return Config(
        run=RunConfig(directory=directory),
        objective=ObjectiveConfig(name=name, **objective),
        model=ModelConfig(**values["model"]),
        data=DataConfig(train="", bos_token_id=bos_token_id, **values["data"]),
        train=TrainConfig(num_steps=1, global_batch_size=2, micro_batch_size=1),
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )
