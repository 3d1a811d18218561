"""The files that a configuration is read from: TOML, and a run's config.json.

A layer is found here or among the configurations that come with the package. A file that cannot be
read is refused with the place of the mistake, a name that does not exist with the closest one.
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
"""Where the configurations are that come with the package."""

_LINE_OF_ERROR = re.compile(r"at line (\d+)")
_HEADER = re.compile(r"\s*\[\s*([\w-]+)\s*\]")
_KEY = re.compile(r"\s*([\w-]+)\s*=")


def read_layer(name: str, folder: Path | None) -> dict[str, Any]:
    """Read the values of a layer by `section.name`; a config.json's that are left out are left out.

    Args:
        name: A file as the command line names it.
        folder: Where a file that does not exist as named is looked for.

    Raises:
        ConfigError: There is no such file, or it is no TOML and no config.json of a run.
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
    """Find the file of this name here or in `folder`.

    Raises:
        ConfigError: There is none; the line suggests one.
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
    """Return whether there is a file of this name; one that is too long for a name is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def suggest_file(name: str, folder: Path | None) -> str:
    """Return the name that was meant, and those that come with the package; empty without them."""
    here = [str(path) for path in Path(name).parent.glob("*.toml")] if len(name) < 256 else []
    shipped = (
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*.toml")) if folder else []
    )
    close = difflib.get_close_matches(name, [*here, *shipped], n=1)
    meant = [each for each in (*here, *shipped) if each == f"{name}.toml"] or close
    hint = f"; did you mean {meant[0]}?" if meant else ""
    listed = [each for each in shipped if "/" not in each]
    return hint + (f" The package has {', '.join(listed)}" if listed else "")


def read_toml(path: Path) -> dict[str, Any]:
    """Read the values of a file by `section.name`.

    Raises:
        ConfigError: It names the line and the key as far as they are known.
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
    """Return `section.name: ` of the line that a message of tomllib names; empty without a key."""
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
        ConfigError: The file is missing, no JSON, or no object.
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
        ConfigError: It is of another format version.
    """
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{source}: format_version = {version}: this version of megatron-eso reads "
            f"{FORMAT_VERSION}; use the version that wrote the file"
        )
    return {name: section for name, section in values.items() if name != "format_version"}


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
