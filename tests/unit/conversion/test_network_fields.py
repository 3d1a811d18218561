"""A run, the sampler's `config.json` and transformers' configuration have the same fields."""

import dataclasses
import inspect
from typing import Any

import pytest

from checkpoints_conversion.network_fields import (
    SHARED_FIELDS,
    build_run_config,
    describe_network,
    describe_objective,
)
from megatron_eso.config.combinations import check_config
from megatron_eso.config.sections import KEYS
from megatron_eso.errors import CheckpointError
from megatron_eso.objectives.build import OBJECTIVES
from megatron_eso.sampler.network.configuration_eso_lm import EsoLMConfig
from megatron_eso.sampler.network.layers_eso_lm import NetworkConfig
from megatron_eso.sampler.network.objective_fields import OBJECTIVE_FIELDS, read_objective
from megatron_eso.sampler.objectives.build import MODELS
from tests.support.configs import make_config
from tests.support.networks import make_network_config

# Keys of the model that do not change a trained network.
TRAINING_ONLY = {
    "model.residual_gates",
    "model.zero_init_head",
    "model.hidden_dropout",
    "model.init_method_std",
    "model.fp32_residual_connection",
    "model.make_vocab_size_divisible_by",
}
# Another legal value of each field, which no other field has.
CHANGED = {
    "vocab_size": 33,
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "intermediate_size": 28,
    "activation": "swiglu",
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-3,
    "rotary_base": 777.0,
    "use_rope_scaling": True,
    "rope_scaling_factor": 32.0,
    "rope_low_freq_factor": 2.0,
    "rope_high_freq_factor": 5.0,
    "rope_original_length": 4096,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "qk_layernorm": True,
    "head_bias": False,
    "tie_word_embeddings": True,
    "mask_token_id": 5,
    "max_length": 9,
}

SCALED = {"use_rope_scaling": True}
WITH = {
    "num_attention_heads": {"num_key_value_heads": 2},
    "rope_scaling_factor": SCALED,
    "rope_low_freq_factor": SCALED,
    "rope_high_freq_factor": SCALED,
    "rope_original_length": SCALED,
    "add_qkv_bias": {"add_bias_linear": False},
}
"""Fields that change with another one, because a run refuses one of them alone."""


def names_of(config_type: type) -> list[str]:
    return [field.name for field in dataclasses.fields(config_type)]


def test_every_field_of_the_network_is_in_the_table_once() -> None:
    fields = [shared.field for shared in SHARED_FIELDS]
    assert sorted(fields) == sorted(names_of(NetworkConfig)) == sorted(CHANGED)


def test_every_key_of_the_model_is_in_the_table_or_for_training_only() -> None:
    paths = [shared.path for shared in SHARED_FIELDS]
    assert len(set(paths)) == len(paths)
    assert {path for path in KEYS if path.startswith("model.")} == TRAINING_ONLY | {
        path for path in paths if path.startswith("model.") and path in KEYS
    }
    assert set(paths) <= KEYS.keys()


def test_transformers_configuration_has_the_fields_of_the_network() -> None:
    parameters = inspect.signature(EsoLMConfig.__init__).parameters
    others = {"self", "kwargs", "objective", "variant", "block_size", "prepend_token"}
    others |= {"sequential_prediction"}
    assert [name for name in parameters if name not in others] == names_of(NetworkConfig)
    values = dataclasses.asdict(make_network_config(**{"norm_epsilon": 1e-3, "rotary_base": 777.0}))
    config = EsoLMConfig(**values)
    assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize("field", CHANGED)
def test_every_field_is_kept_through_a_run(field: str) -> None:
    network = make_network_config(**{**WITH.get(field, {}), field: CHANGED[field]})
    assert getattr(network, field) != getattr(make_network_config(), field)
    config = build_run_config(network, {"alpha_0": 0.25}, "runs/test")
    check_config(config)
    assert config.objective.alpha_0 == 0.25
    again = describe_network(config, "config.json")
    assert again == network
    for name in names_of(NetworkConfig):
        assert type(getattr(again, name)) is type(getattr(network, name))


@pytest.mark.parametrize(
    "objective",
    [
        {"objective": "eso_lm", "variant": "a", "alpha_0": 0.25, "order": "uniform"},
        {"objective": "eso_lm", "variant": "b", "sequential_prediction": "next"},
        {"objective": "mdlm"},
        {"objective": "ar", "prepend_token": "none"},
        {"objective": "ar", "prepend_token": "bos", "bos_token_id": 2},
        {"objective": "bd3_lm", "block_size": 4},
        {"objective": "set_dlm", "order": "staggered", "set_size": 2, "max_set_size": 6},
        {"objective": "any_order_ar", "order": "left_to_right"},
    ],
)
def test_the_objective_is_kept_through_a_run(objective: dict[str, Any]) -> None:
    config = build_run_config(make_network_config(), objective, "runs/test")
    check_config(config)
    found = describe_objective(config)
    assert objective.items() <= found.items()
    # The sampler reads it.
    assert objective.items() <= read_objective(found).items()


def test_every_objective_of_training_has_a_sampler() -> None:
    assert set(OBJECTIVE_FIELDS) == set(OBJECTIVES) == set(MODELS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_base": 10000.5}, "rotary_base 10000.5 is not a whole number"),
    ],
)
def test_a_network_that_no_run_has_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        build_run_config(make_network_config(**changes), {"alpha_0": 0.5}, "runs/test")


def test_a_run_without_its_vocabulary_is_refused() -> None:
    with pytest.raises(CheckpointError, match="config.json: data.vocab_size and data.mask_token"):
        describe_network(make_config(), "config.json")
