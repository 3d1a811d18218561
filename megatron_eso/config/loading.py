"""TOML files and `section.key=value` arguments to a Config, and a Config to JSON and TOML.

Layers apply in the order of the command line, each key on its own; the later value wins.
"""

import dataclasses
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eso.config.combinations import check_config
from megatron_eso.config.origins import COMMAND_LINE, Origins
from megatron_eso.config.sections import FORMAT_VERSION, KEYS, SECTIONS, Config
from megatron_eso.config.values import check_value, parse_override, refuse_key, refuse_section
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
    for argument in arguments:
        match = OVERRIDE.fullmatch(argument)
        if match:
            layer, origin = (
                {match["key"]: parse_override(match["key"], match["text"])},
                COMMAND_LINE,
            )
        else:
            layer, origin = read_toml(find_file(argument, folder)), argument
        for key, value in layer.items():
            values[key] = check_value(key, value, origin)
            origins[key] = origin
    config = build_config(values, ", ".join(dict.fromkeys(origins.values())) or COMMAND_LINE)
    return LoadedConfig(
        config=config, origins=origins, warnings=tuple(check_config(config, origins))
    )


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
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{source}: format_version = {version}: this version of megatron-eso reads "
            f"{FORMAT_VERSION}; use the version that wrote the file"
        )
    sections = {name: section for name, section in values.items() if name != "format_version"}
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
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as config.json: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no configuration; name a run directory's config.json")
    return config_from_dict(values, str(path))


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


def find_file(name: str, folder: Path | None) -> Path:
    """Find the file of this name here or in `folder`."""
    candidates = [Path(name)] + ([folder / name] if folder else [])
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if "=" in name:
        raise ConfigError(f"{COMMAND_LINE}: {name}: is neither a file nor section.key=value")
    searched = f" or in {folder}" if folder else ""
    raise ConfigError(f"{COMMAND_LINE}: {name}: there is no such file here{searched}")


def read_toml(path: Path) -> dict[str, Any]:
    """Read the values of a file by `section.name`."""
    try:
        with path.open("rb") as file:
            return flatten(tomllib.load(file), str(path))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from error


def flatten(sections: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return the values by `section.name`."""
    flat = {}
    for name, section in sections.items():
        if not isinstance(section, Mapping):
            refuse_key(name, origin)
        if name not in SECTIONS:
            refuse_section(name, origin)
        for key, value in section.items():
            flat[f"{name}.{key}"] = value
    return flat


def build_config(values: Mapping[str, Any], source: str) -> Config:
    """Build the sections from checked values by `section.name`.

    Raises:
        ConfigError: A key that has no default is missing.
    """
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for path, key in KEYS.items():
        section, _, name = path.partition(".")
        if path in values:
            sections[section][name] = values[path]
        elif key.is_required:
            raise ConfigError(
                f"{source}: {path} is missing: set {name} under [{section}] or pass {path}=VALUE"
            )
    return Config(**{name: SECTIONS[name](**given) for name, given in sections.items()})
