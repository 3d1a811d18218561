"""TOML files and `section.key=value` arguments to a Config, and a Config to JSON and TOML.

Layers apply in the order of the command line, each key on its own; the later value wins.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eso.config.combinations import check_config, check_locations
from megatron_eso.config.layers import flatten, read_json, read_layer, unwrap_config
from megatron_eso.config.origins import COMMAND_LINE, Origins, TracedConfig
from megatron_eso.config.sections import FORMAT_VERSION, KEYS, SECTIONS, Config
from megatron_eso.config.values import check_value, parse_override
from megatron_eso.errors import ConfigError

OVERRIDE = re.compile(r"(?P<key>[A-Za-z_]\w*(\.\w+)*)=(?P<text>.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedConfig:
    """A checked configuration and the warnings about it."""

    config: Config
    origins: Origins
    """Where each key was set, for the errors of later checks."""
    warnings: tuple[str, ...]


def load_config(arguments: Sequence[str], *, folder: Path | None = None) -> LoadedConfig:
    """Read and check the configuration that a command line describes.

    Args:
        arguments: TOML files and `section.key=value` in any order; values are TOML, or else text.
        folder: Where a file that does not exist as named is looked for.

    Returns:
        The configuration, resolved and checked but for the number of ranks.

    Raises:
        ConfigError: One line that names file or command line, key, value and remedy.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    sources: list[str] = []
    for argument in arguments:
        match = OVERRIDE.fullmatch(argument)
        if match:
            layer, origin = (
                {match["key"]: parse_override(match["key"], match["text"])},
                COMMAND_LINE,
            )
        else:
            layer, origin = read_layer(argument, folder), argument
        sources.append(origin)
        for key, value in layer.items():
            values[key] = check_value(key, value, origin)
            origins[key] = origin
    config = build_config(values, ", ".join(dict.fromkeys(sources)) or COMMAND_LINE)
    warnings = tuple(check_config(config, origins))
    check_locations(TracedConfig(config=config, origins=origins))
    return LoadedConfig(config=config, origins=origins, warnings=warnings)


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return the content of config.json: the sections, and `format_version`."""
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}


def config_from_dict(values: Mapping[str, Any], source: str) -> Config:
    """Undo `config_to_dict`, as strictly as a TOML file is read.

    Args:
        values: The content of a config.json.
        source: Its path, for errors.

    Raises:
        ConfigError: Another format, or a configuration that does not hold together.
    """
    sections = unwrap_config(values, source)
    flat = {key: value for key, value in flatten(sections, source).items() if value is not None}
    config = build_config(
        {key: check_value(key, value, source) for key, value in flat.items()}, source
    )
    check_config(config, dict.fromkeys(flat, source))
    return config


def read_config(path: Path) -> Config:
    """Read a config.json.

    Raises:
        ConfigError: The file is missing, no JSON, or no configuration of this version.
    """
    return config_from_dict(read_json(path), str(path))


def config_to_toml(config: Config) -> str:
    """Write the resolved configuration as TOML that `load_config` reads back."""
    lines = []
    for name, section in dataclasses.asdict(config).items():
        lines.append(f"[{name}]")
        lines += [
            f"{key} = {json.dumps(v, ensure_ascii=False)}"
            for key, v in section.items()
            if v is not None
        ]
        lines.append("")
    return "\n".join(lines)


def build_config(values: Mapping[str, Any], source: str) -> Config:
    """Build the sections from checked values by `section.name`.

    Raises:
        ConfigError: A key that has no default is missing.
    """
    missing = [path for path, key in KEYS.items() if key.is_required and path not in values]
    if missing:
        section, _, name = missing[0].partition(".")
        are = "is" if len(missing) == 1 else "are"
        raise ConfigError(
            f"{source}: {', '.join(missing)} {are} missing: set {name} under [{section}] or pass "
            f"{missing[0]}=VALUE"
        )
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for path, value in values.items():
        section, _, name = path.partition(".")
        sections[section][name] = value
    return Config(**{name: SECTIONS[name](**given) for name, given in sections.items()})
