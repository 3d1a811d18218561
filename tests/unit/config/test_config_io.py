"""TOML layers, overrides and strict types; JSON and TOML output."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_eso.config.loading import (
    config_from_dict,
    config_to_dict,
    config_to_toml,
    load_config,
    read_config,
)
from megatron_eso.errors import ConfigError
from tests.support.configs import make_config

ARGUMENTS = [
    "run.directory=runs/test",
    "model.num_layers=4",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "data.train=shards",
    "data.sequence_length=16",
    "train.num_steps=10",
    "train.global_batch_size=16",
    "train.micro_batch_size=4",
    "optimizer.learning_rate=1e-3",
]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_later_layers_win_key_by_key(tmp_path: Path) -> None:
    first = write(tmp_path / "first.toml", "[model]\nnum_layers = 2\nrotary_base = 500\n")
    second = write(tmp_path / "second.toml", "[model]\nnum_layers = 6\n")
    loaded = load_config([*ARGUMENTS, first, second])
    assert (loaded.config.model.num_layers, loaded.config.model.rotary_base) == (6, 500)
    assert loaded.origins["model.num_layers"] == second
    assert loaded.origins["model.rotary_base"] == first
    assert loaded.origins["model.hidden_size"] == "command line"
    assert load_config([first, *ARGUMENTS]).config.model.num_layers == 4


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.learning_rate=3", 3.0),
        ("run.directory=plain text = with sign", "plain text = with sign"),
        ('run.directory="quoted"', "quoted"),
        ("run.directory=2024", "2024"),
        ("run.wandb_project=", ""),
        ("parallel.sequence_parallel=false", False),
        ("objective.loss_type=low_var", "low_var"),
        ("data.vocab_size=98", 98),
        ("train.num_steps=1_000", 1000),
        ("data.train=shards/a", "shards/a"),
        ('data.train=["a"]', ("a",)),
        ("data.train=2024", "2024"),
    ],
)
def test_an_override_is_toml_or_text(override: str, value: object) -> None:
    section, key = override.split("=")[0].split(".")
    found = getattr(getattr(load_config([*ARGUMENTS, override]).config, section), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hiden_size=3", "model.hiden_size is not a key: did you mean model.hidden_size?"),
        ("modl.hidden_size=3", "[modl] is not a section: did you mean [model]?"),
        ("seed=3", "seed is not a key: did you mean run.seed?"),
        ("train.learning_rate=3", "is not a key: did you mean optimizer.learning_rate?"),
        ("run.zzz=3", "run.zzz is not a key: keys of [run] are directory, seed"),
        ("run.seed.x=3", "run.seed.x is not a key"),
        ("model.num_layers=4.0", "model.num_layers = 4.0: expects a whole number; write 4"),
        ("model.num_layers=1e11", "= 100000000000.0: expects a whole number of at most 10000"),
        ("model.num_layers=true", "model.num_layers = true: expects a whole number"),
        ("model.qk_layernorm=1", "model.qk_layernorm = 1: expects true or false"),
        ("model.qk_layernorm=True", 'expects true or false; write true'),
        ("model.norm_epsilon=nan", "model.norm_epsilon = NaN: must be finite"),
        ("model.norm_epsilon=tiny", 'model.norm_epsilon = "tiny": expects a number'),
        ("train.precision=fp16", 'train.precision = "fp16": must be one of "fp32", "bf16"'),
        ("data.vocab_size=many", 'data.vocab_size = "many": expects a whole number'),
        ("train.num_steps=9223372036854775808", "does not fit into 64 bits"),
        ("train.num_steps=[1]", "train.num_steps = [1]: expects a whole number"),
        ("data.train=[1]", 'data.train = 1: expects a string; write "1"'),
        ("data.train_weights=3", "data.train_weights = 3: expects a list of numbers"),
        ('data.train_weights=["a"]', 'data.train_weights = "a": expects a number'),
        ("data.train_weights=[inf]", "data.train_weights = Infinity: must be finite"),
        ("data.train_weights=[[1]]", "data.train_weights = [1]: expects a number"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config([*ARGUMENTS, override])
    assert str(raised.value).startswith("command line: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nnum_layers = '4'\n", 'model.num_layers = "4": expects a whole number; write 4'),
        ("[model\n", "cannot be read as TOML"),
        ("seed = 3\n", "seed is not a key: did you mean run.seed?"),
        ("[model.extra]\nx = 1\n", "model.extra is not a key"),
        ("[[model]]\nx = 1\n", "model is not a key"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "wrong.toml", text)
    with pytest.raises(ConfigError) as raised:
        load_config([*ARGUMENTS, path])
    assert str(raised.value).startswith(f"{path}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="command line: model.num_layers is missing: set num_la"):
        load_config([argument for argument in ARGUMENTS if "num_layers" not in argument])
    with pytest.raises(
        ConfigError, match="^command line: run.directory, model.num_layers, .* are missing"
    ):
        load_config([])


def test_files_are_found_here_or_in_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "deep.toml", "[model]\nnum_layers = 9\n")
    assert load_config([*ARGUMENTS, "deep.toml"], folder=tmp_path).config.model.num_layers == 9
    with pytest.raises(ConfigError, match="command line: deep.toml: there is no such file here"):
        load_config([*ARGUMENTS, "deep.toml"])
    with pytest.raises(ConfigError, match="is neither a file nor section.key=value"):
        load_config([*ARGUMENTS, "model-num=3"])


def test_the_resolved_configuration_survives_toml_and_json(tmp_path: Path) -> None:
    name = 'run.directory="runs/\\"quoted\\" \\u00e9 \\U0001F600"'
    blend = ['data.train=["a", "\\u00e9"]', "data.train_weights=[1, 0.25]"]
    config = load_config([*ARGUMENTS, name, *blend, "data.vocab_size=98"]).config
    path = write(tmp_path / "resolved.toml", config_to_toml(config))
    assert load_config([path]).config == config
    path = write(tmp_path / "config.json", json.dumps(config_to_dict(config)))
    assert read_config(Path(path)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "format_version = 3: this version of megatron-eso reads 1 and 2"),
        ({"format_version": None}, "holds no format_version"),
        ({"mode": {}}, r"\[mode\] is not a section: did you mean \[model\]"),
        ({"model": 3}, "model is not a key"),
        ({"run": {"directory": 3}}, "run.directory = 3: expects a string"),
    ],
)
def test_another_config_json_is_refused(change: dict[str, Any], message: str) -> None:
    values = config_to_dict(load_config(ARGUMENTS).config) | change
    with pytest.raises(ConfigError, match=rf"run/config.json: {message}"):
        config_from_dict(values, "run/config.json")


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_a_damaged_config_json_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="config.json"):
        read_config(Path(write(tmp_path / "config.json", text)))


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


@given(value=LEAVES | st.lists(LEAVES, max_size=2), data=st.data())
def test_any_json_is_a_config_or_one_line(value: object, data: st.DataObject) -> None:
    values = copy.deepcopy(config_to_dict(load_config(ARGUMENTS).config))
    section = data.draw(st.sampled_from(sorted(set(values) - {"format_version"})))
    values[section][data.draw(st.sampled_from(sorted(values[section])))] = value
    message = ""
    try:
        config_from_dict(values, "config.json")
    except ConfigError as error:
        message = str(error)
    assert message.isprintable()


def test_version_1_had_no_order_of_the_sequential_phase() -> None:
    """Read what version 1 wrote: an order that only any-order AR had."""
    values = config_to_dict(make_config()) | {"format_version": 1}
    values["objective"] |= {"order": "uniform"}
    assert config_from_dict(values, "config.json").objective.order == "left_to_right"
    values["objective"] |= {"name": "any_order_ar", "batch_split": 1.0}
    assert config_from_dict(values, "config.json").objective.order == "uniform"
