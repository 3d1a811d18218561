"""Each key that a checkpoint fixes is refused when it changes; other changes are logged."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_eso.config.model import ModelConfig
from megatron_eso.config.sections import KEYS, Config
from megatron_eso.errors import ConfigError
from megatron_eso.training.checkpointing.kept_keys import check_same, check_weights
from tests.support.configs import make_config, replace_value

REMEDY = "restore the value"
CHECKPOINT = Path("runs/a/checkpoints/step_00000002")
OLD = make_config()


def shown(value: Any) -> str:
    """Return a value as the configuration writes it."""
    return "not set" if value is None else json.dumps(value)


def change(config: Config, path: str) -> tuple[Config, Any]:
    """Another value of a key; it need not be legal, since the key alone decides."""
    value = config.get(path)
    if isinstance(value, bool):
        new: Any = not value
    else:
        new = value + 1 if isinstance(value, int | float) else "another"
    return replace_value(config, path, new), new


@pytest.mark.parametrize("path", KEYS)
def test_a_run_that_continues_logs_or_refuses_every_change(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    old = make_config().get(path)
    config, new = change(make_config(), path)
    if KEYS[path].is_frozen("run"):
        with pytest.raises(ConfigError) as raised:
            check_same(CHECKPOINT, OLD, config, "run", REMEDY)
        line = f"{path} = {shown(new)}, but {CHECKPOINT} was written with {shown(old)}: {REMEDY}"
        assert str(raised.value) == line
        return
    check_same(CHECKPOINT, OLD, config, "run", REMEDY)
    assert caplog.messages == [f"changed since step_00000002: {path}: {shown(old)} -> {shown(new)}"]


@pytest.mark.parametrize("path", KEYS)
def test_weights_of_another_run_fix_less(path: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config, new = change(make_config(), path)
    if KEYS[path].is_frozen("weights"):
        with pytest.raises(ConfigError, match="set that, or start from other weights"):
            check_weights(CHECKPOINT, OLD, config)
        check_weights(CHECKPOINT, OLD, config, ignored=(path,))
        assert caplog.messages == []
        return
    check_weights(CHECKPOINT, OLD, config)
    assert caplog.messages == (
        [f"changed since step_00000002: {path}: {shown(make_config().get(path))} -> {shown(new)}"]
        if KEYS[path].is_logged
        else []
    )


@pytest.mark.parametrize("path", ["objective.name", "objective.variant"])
def test_another_objective_is_refused_on_resume(path: str) -> None:
    """Refuse to resume; the weights may still start a run of another objective."""
    config = replace_value(make_config(), path, "another")
    with pytest.raises(ConfigError, match=f'^{path} = "another", but .* was written with "'):
        check_same(CHECKPOINT, OLD, config, "run", REMEDY)
    check_weights(CHECKPOINT, OLD, config)


def test_a_list_is_shown_as_in_toml(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = replace_value(make_config(), "data.train", ("a", "b"))
    check_same(CHECKPOINT, OLD, config, "run", REMEDY)
    assert caplog.messages == ['changed since step_00000002: data.train: "shards" -> ["a", "b"]']
    check_same(CHECKPOINT, config, config, "run", REMEDY)
    assert len(caplog.messages) == 1


def test_a_refused_model_names_a_key_that_somebody_set() -> None:
    """`model.ffn_hidden_size` follows from the hidden size where it is left out."""
    config = make_config(model=ModelConfig(num_layers=4, hidden_size=128, num_attention_heads=4))
    with pytest.raises(ConfigError, match=r"^model.hidden_size = 128, but .* written with 64"):
        check_same(CHECKPOINT, OLD, config, "run", REMEDY)
    with pytest.raises(ConfigError, match=r"^model.ffn_hidden_size = 9, but .* written with 256"):
        check_same(CHECKPOINT, OLD, replace_value(OLD, "model.ffn_hidden_size", 9), "run", REMEDY)


@pytest.mark.parametrize(
    ("origins", "origin"),
    [
        ({"model.hidden_size": "command line"}, "command line: "),
        ({"model.hidden_size": "wide.toml"}, "wide.toml: "),
        ({}, "default: "),
        (None, ""),
    ],
)
def test_a_refused_model_names_the_layer_that_set_it(
    origins: dict[str, str] | None, origin: str
) -> None:
    config = replace_value(OLD, "model.hidden_size", 128)
    with pytest.raises(ConfigError, match=f"^{origin}model.hidden_size = 128, but "):
        check_same(CHECKPOINT, OLD, config, "run", REMEDY, origins=origins)
    with pytest.raises(ConfigError, match=f"^{origin}model.hidden_size = 128, but "):
        check_weights(CHECKPOINT, OLD, config, origins=origins)
