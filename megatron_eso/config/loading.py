"""A Config from TOML files and `section.key=value` arguments, and its JSON and TOML.

Arguments apply in the order of the command line; for each key the last value counts.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eso.config.combinations import check_config
from megatron_eso.config.layers import flatten, read_json, read_layer, unwrap_config
from megatron_eso.config.origins import COMMAND_LINE, Origins, TracedConfig
from megatron_eso.config.sections import FORMAT_VERSION, KEYS, SECTIONS, Config
from megatron_eso.config.values import check_locations, check_value, parse_override
from megatron_eso.errors import ConfigError

OVERRIDE = re.compile(r"(?P<key>[A-Za-z_]\w*(\.\w+)*)=(?P<text>.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedConfig:
    """A checked configuration, with the origins of its values and warnings."""

    config: Config
    origins: Origins
    """Where each key was set; later checks name it in their errors."""
    warnings: tuple[str, ...]


def load_config(arguments: Sequence[str], *, folder: Path | None = None) -> LoadedConfig:
    """Read and check the configuration that a command line describes.

    Args:
        arguments: TOML files and `section.key=value` in any order; what is not TOML is text.
        folder: The second place to search for files.

    Returns:
        The resolved configuration; everything is checked except the number of ranks.

    Raises:
        ConfigError: One line that names file or command line, key, value and remedy.
    """
    # Read the layers and overrides; for each key the last value counts.
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
    # Build the sections, and check their combination.
    config = build_config(values, ", ".join(dict.fromkeys(sources)) or COMMAND_LINE)
    warnings = tuple(check_config(config, origins))
    check_locations(TracedConfig(config=config, origins=origins))
    return LoadedConfig(config=config, origins=origins, warnings=warnings)


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return the content of config.json: the sections, and `format_version`."""
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}


def config_from_dict(values: Mapping[str, Any], source: str) -> Config:
    """Build a Config from the content of config.json, as strictly as from TOML.

    Args:
        values: The content of a config.json.
        source: Path of the file, for errors.

    Raises:
        ConfigError: The format is another one, or a value or combination is refused.
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
        ConfigError: The file is missing, or is not a configuration of this version.
    """
    return config_from_dict(read_json(path), str(path))


def config_to_toml(config: Config) -> str:
    """Return the resolved configuration as TOML, which `load_config` reads."""
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
        ConfigError: A required key is missing.
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
