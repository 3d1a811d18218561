"""Configuration layers: TOML files, and the config.json of a run.

A layer is searched in the current folder and among the configurations of the package. The error for
a file that cannot be read names the line and key; that for a missing file suggests a similar name.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_eso.config.origins import COMMAND_LINE, shorten
from megatron_eso.config.sections import FORMAT_VERSION, SECTIONS
from megatron_eso.config.values import refuse_key, refuse_section
from megatron_eso.errors import ConfigError

SHIPPED_CONFIGS = Path(__file__).resolve().parents[2] / "pretrain" / "configs"
"""The folder of the configurations that come with the package."""

_LINE_OF_ERROR = re.compile(r"at line (\d+)")
_HEADER = re.compile(r"\s*\[\s*([\w-]+)\s*\]")
_KEY = re.compile(r"\s*([\w-]+)\s*=")


def read_layer(name: str, folder: Path | None) -> dict[str, Any]:
    """Read the values of a layer by `section.name`, without keys that a config.json leaves out.

    Args:
        name: The file as the command line names it.
        folder: The second place to search for the file.

    Raises:
        ConfigError: The file does not exist, or is neither TOML nor the config.json of a run.
    """
    path = find_file(name, folder)
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        raise ConfigError(f"{COMMAND_LINE}: {name}: layers are TOML files; write this one as TOML")
    if suffix != ".json":
        return read_toml(path)
    sections = unwrap_config(read_json(path), str(path))
    values = flatten(sections, str(path))
    return {key: value for key, value in values.items() if value is not None}


def find_file(name: str, folder: Path | None) -> Path:
    """Find the file of this name in the current folder or in `folder`.

    Raises:
        ConfigError: The file does not exist; the error suggests a similar name.
    """
    candidates = [Path(name)] + ([folder / name] if folder else [])
    for candidate in candidates:
        if is_file(candidate):
            return candidate
    if "=" in name:
        raise ConfigError(
            f"{COMMAND_LINE}: {shorten(name)}: is neither a file nor section.key=value"
        )
    searched = f" or in {folder}" if folder else ""
    raise ConfigError(
        f"{COMMAND_LINE}: {shorten(name)}: there is no such file here{searched}"
        f"{suggest_file(name, folder)}"
    )


def is_file(path: Path) -> bool:
    """Return whether the file exists; false where the name is too long for a file."""
    try:
        return path.is_file()
    except OSError:
        return False


def suggest_file(name: str, folder: Path | None) -> str:
    """Return a similar name and those of the package, for an error; empty without any."""
    here = [str(path) for path in Path(name).parent.glob("*.toml")] if len(name) < 256 else []
    shipped = (
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*.toml")) if folder else []
    )
    close = difflib.get_close_matches(name, [*here, *shipped], n=1)
    meant = [each for each in (*here, *shipped) if each == f"{name}.toml"] or close
    listed = [each for each in shipped if "/" not in each]
    hints = [f"the package has {', '.join(listed)}"] if listed else []
    hints += [f"did you mean {meant[0]}?"] if meant else []
    return "".join(f"; {hint}" for hint in hints)


def read_toml(path: Path) -> dict[str, Any]:
    """Read the values of a file by `section.name`.

    Raises:
        ConfigError: The file cannot be read; the error names line and key where they are known.
    """
    text = ""
    try:
        text = path.read_text(encoding="utf-8-sig")
        return flatten(tomllib.loads(text), str(path))
    except (OSError, ValueError) as error:
        where = locate_error(text, str(error))
        raise ConfigError(f"{path}: {where}cannot be read as TOML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: cannot be read as TOML: it nests lists too deeply") from error


def locate_error(text: str, message: str) -> str:
    """Return `section.name: ` for the line in a message of tomllib; empty without a key."""
    found = _LINE_OF_ERROR.search(message)
    lines = text.splitlines()[: int(found[1])] if found else []
    key = _KEY.match(lines[-1]) if lines else None
    if key is None:
        return ""
    headers = [header[1] for line in lines if (header := _HEADER.match(line))]
    return shorten(".".join([*headers[-1:], key[1]])) + ": "


def read_json(path: Path) -> dict[str, Any]:
    """Read a config.json.

    Raises:
        ConfigError: The file is missing, or does not hold a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as config.json: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no configuration; name a run directory's config.json")
    return values


def unwrap_config(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the sections of a config.json.

    Raises:
        ConfigError: The file has another format version.
    """
    version = values.get("format_version")
    if version is None:
        raise ConfigError(
            f"{source}: holds no format_version; give the config.json of a run, or a TOML file"
        )
    if version not in (1, FORMAT_VERSION):
        raise ConfigError(
            f"{source}: format_version = {version}: this version of megatron-eso reads 1 and "
            f"{FORMAT_VERSION}; use the version that wrote the file"
        )
    sections = {name: section for name, section in values.items() if name != "format_version"}
    objective = sections.get("objective")
    if version == 1 and isinstance(objective, dict) and objective.get("name") != "any_order_ar":
        # Version 1 wrote an order for objectives that had none.
        sections["objective"] = {key: objective[key] for key in objective if key != "order"}
    return sections


def flatten(sections: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return the values by `section.name`.

    Raises:
        ConfigError: A section does not exist.
    """
    flat = {}
    for name, section in sections.items():
        if not isinstance(section, Mapping):
            refuse_key(name, origin)
        if name not in SECTIONS:
            refuse_section(name, origin)
        for key, value in section.items():
            flat[f"{name}.{key}"] = value
    return flat
