"""Each key that a checkpoint fixes is refused when it changes; other changes are logged."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_eso.config.loading import config_to_dict
from megatron_eso.config.sections import KEYS, Config
from megatron_eso.errors import ConfigError
from megatron_eso.training.checkpointing.restore import check_same, check_weights
from tests.support.configs import make_config, replace_value

REMEDY = "restore the value"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step_00000002"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_dict(make_config())))
    return folder


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
    checkpoint: Path, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    old = make_config().get(path)
    config, new = change(make_config(), path)
    if KEYS[path].is_frozen("run"):
        with pytest.raises(ConfigError) as raised:
            check_same(checkpoint, config, "run", REMEDY)
        line = f"{path} = {new!r}, but {checkpoint} was written with {old!r}: {REMEDY}"
        assert str(raised.value) == line
        return
    check_same(checkpoint, config, "run", REMEDY)
    assert caplog.messages == [f"changed since step_00000002: {path}: {old!r} -> {new!r}"]


@pytest.mark.parametrize("path", KEYS)
def test_weights_of_another_run_fix_less(
    checkpoint: Path, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config, new = change(make_config(), path)
    if KEYS[path].is_frozen("weights"):
        with pytest.raises(ConfigError, match="set that, or start from other weights"):
            check_weights(checkpoint, config)
        check_weights(checkpoint, config, ignored=(path,))
        assert caplog.messages == []
        return
    check_weights(checkpoint, config)
    assert caplog.messages == (
        [f"changed since step_00000002: {path}: {make_config().get(path)!r} -> {new!r}"]
        if KEYS[path].is_logged
        else []
    )


@pytest.mark.parametrize("path", ["objective.name", "objective.variant"])
def test_another_objective_is_refused_on_resume(checkpoint: Path, path: str) -> None:
    """Refuse to resume; the weights may still start a run of another objective."""
    config = replace_value(make_config(), path, "another")
    with pytest.raises(ConfigError, match=f"^{path} = 'another', but .* was written with '"):
        check_same(checkpoint, config, "run", REMEDY)
    check_weights(checkpoint, config)


def test_a_list_is_shown_as_in_toml(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = replace_value(make_config(), "data.train", ("a", "b"))
    check_same(checkpoint, config, "run", REMEDY)
    assert caplog.messages == ["changed since step_00000002: data.train: 'shards' -> ['a', 'b']"]
    (checkpoint / "config.json").write_text(json.dumps(config_to_dict(config)))
    check_same(checkpoint, config, "run", REMEDY)
    assert len(caplog.messages) == 1
