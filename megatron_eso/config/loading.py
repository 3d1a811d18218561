"""TOML files and `section.key=value` arguments to a Config, and a Config to JSON and TOML.

Layers apply in the order of the command line, each key on its own; the later value wins. Types are
strict: nothing is converted but a whole number where a float is expected.
"""

import dataclasses
import difflib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from megatron_eso.config.combinations import Origins, check_config
from megatron_eso.config.sections import FORMAT_VERSION, Config
from megatron_eso.errors import ConfigError

COMMAND_LINE = "command line"
MAX_INTEGER = 2**63 - 1
OVERRIDE = re.compile(r"(?P<key>[A-Za-z_]\w*(\.\w+)*)=(?P<text>.*)", re.DOTALL)

SECTIONS: dict[str, type] = typing.get_type_hints(Config)
HINTS = {name: typing.get_type_hints(section) for name, section in SECTIONS.items()}
TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    tuple[str, ...]: "a list of strings",
    tuple[float, ...]: "a list of numbers",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedConfig:
    """A checked configuration and what is to be said about it."""

    config: Config
    origins: Origins
    """Where each key was set, for the errors of later checks."""
    warnings: tuple[str, ...]


def load_config(arguments: Sequence[str], *, folder: Path | None = None) -> LoadedConfig:
    """Read and check the configuration that a command line describes.

    Args:
        arguments: TOML files and `section.key=value` in any order; values are TOML, or else text.
        folder: where a file that does not exist as named is looked for.

    Returns:
        The configuration, resolved and checked but for the number of ranks.

    Raises:
        ConfigError: one line that names file or command line, key, value and remedy.
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
    """The content of config.json: the sections, and `format_version`."""
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}


def config_from_dict(values: Mapping[str, Any], source: str) -> Config:
    """Undo `config_to_dict`, as strictly as a TOML file is read.

    Args:
        values: the content of a config.json.
        source: its path, for errors.

    Raises:
        ConfigError: another format, or a configuration that does not hold together.
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
        ConfigError: the file is missing, no JSON, or no configuration of this version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as config.json: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no configuration; name a run directory's config.json")
    return config_from_dict(values, str(path))


def config_to_toml(config: Config) -> str:
    """The resolved configuration as a TOML file that `load_config` reads back."""
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
    """The file of this name here or in `folder`."""
    candidates = [Path(name)] + ([folder / name] if folder else [])
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if "=" in name:
        raise ConfigError(f"{COMMAND_LINE}: {name}: is neither a file nor section.key=value")
    searched = f" or in {folder}" if folder else ""
    raise ConfigError(f"{COMMAND_LINE}: {name}: there is no such file here{searched}")


def read_toml(path: Path) -> dict[str, Any]:
    """Values by `section.key`."""
    try:
        with path.open("rb") as file:
            return flatten(tomllib.load(file), str(path))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from error


def flatten(sections: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Values by `section.key`."""
    flat = {}
    for name, section in sections.items():
        if not isinstance(section, Mapping):
            refuse_key(name, origin)
        if name not in SECTIONS:
            refuse_section(name, origin)
        for key, value in section.items():
            flat[f"{name}.{key}"] = value
    return flat


def parse_override(key: str, text: str) -> Any:
    """The value of `key=text`: TOML, or the text itself if that is no TOML or a string is due."""
    try:
        document = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = document["value"]
    accepted = accepted_types(find_hint(key, COMMAND_LINE))
    is_list = isinstance(value, list) and find_item_type(accepted) is not None
    wants_text = str in accepted and not isinstance(value, str) and not is_list
    return text if len(document) > 1 or wants_text else value


def check_value(key: str, value: Any, origin: str) -> Any:
    """The value as its key's type; lists become tuples."""
    hint = find_hint(key, origin)
    accepted = accepted_types(hint)
    item_type = find_item_type(accepted)
    if item_type is not None and isinstance(value, list | tuple):
        return tuple(check_scalar(key, item, origin, (item_type,)) for item in value)
    value = check_scalar(key, value, origin, accepted)
    if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
        choices = ", ".join(json.dumps(choice) for choice in typing.get_args(hint))
        refuse(origin, key, value, f"must be one of {choices}")
    return value


def check_scalar(key: str, value: Any, origin: str, accepted: tuple[Any, ...]) -> Any:
    """The value of a key, or of an item of its list, as an accepted type."""
    if type(value) is int and not -MAX_INTEGER <= value <= MAX_INTEGER:
        refuse(origin, key, value, "does not fit into 64 bits")
    if float in accepted and type(value) is int:
        value = float(value)
    if type(value) not in accepted:
        expected = " or ".join(TYPE_NAMES[accept] for accept in accepted)
        refuse(origin, key, value, f"expects {expected}{suggest_value(value, accepted)}")
    if isinstance(value, float) and not math.isfinite(value):
        refuse(origin, key, value, "must be finite")
    return value


def find_item_type(accepted: tuple[Any, ...]) -> type | None:
    """The type of the items where a list is accepted."""
    items = [typing.get_args(member)[0] for member in accepted if typing.get_origin(member)]
    return items[0] if items else None


def accepted_types(hint: Any) -> tuple[Any, ...]:
    """The types that a field's annotation allows, None aside: a key is left out instead."""
    if typing.get_origin(hint) is Literal:
        return (str,)
    if isinstance(hint, types.UnionType):
        return tuple(member for member in typing.get_args(hint) if member is not type(None))
    return (hint,)


def build_config(values: Mapping[str, Any], source: str) -> Config:
    """Build the sections from checked values by `section.key`."""
    sections = {}
    for name, section in SECTIONS.items():
        for field in dataclasses.fields(section):
            is_required = field.default is field.default_factory is dataclasses.MISSING
            if is_required and f"{name}.{field.name}" not in values:
                raise ConfigError(
                    f"{source}: {name}.{field.name} is missing: set {field.name} under [{name}] "
                    f"or pass {name}.{field.name}=VALUE"
                )
        prefix = name + "."
        given = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        sections[name] = section(**given)
    return Config(**sections)


def find_hint(key: str, origin: str) -> Any:
    """The annotation of `section.key`."""
    section, _, name = key.partition(".")
    if not name:
        refuse_key(key, origin)
    if section not in SECTIONS:
        refuse_section(section, origin)
    if name not in HINTS[section]:
        refuse_key(key, origin)
    return HINTS[section][name]


def refuse_section(name: str, origin: str) -> NoReturn:
    """Refuse an unknown section."""
    close = difflib.get_close_matches(name, SECTIONS, n=1)
    hint = f"did you mean [{close[0]}]?" if close else f"sections are {', '.join(SECTIONS)}"
    raise ConfigError(f"{origin}: [{name}] is no section: {hint}")


def refuse_key(key: str, origin: str) -> NoReturn:
    """Refuse an unknown key, with the closest one of its section or else of all."""
    section, _, name = key.rpartition(".")
    own = {f"{section}.{known}": known for known in HINTS.get(section, ())}
    every = {f"{other}.{known}": known for other, hints in HINTS.items() for known in hints}
    for candidates in (own, every):
        close = difflib.get_close_matches(name, candidates.values(), n=1, cutoff=0.7)
        if close:
            found = [path for path, known in candidates.items() if known == close[0]]
            raise ConfigError(
                f"{origin}: {key} is no key: did you mean {' or '.join(sorted(found))}?"
            )
    known_keys = f"keys of [{section}] are {', '.join(own.values())}" if own else "see the README"
    raise ConfigError(f"{origin}: {key} is no key: {known_keys}")


def refuse(origin: str, key: str, value: Any, remedy: str) -> NoReturn:
    """Refuse a value."""
    raise ConfigError(f"{origin}: {key} = {json.dumps(value, default=str)}: {remedy}")


def suggest_value(value: Any, accepted: tuple[Any, ...]) -> str:
    """What to write instead, where that can be told."""
    if accepted == (str,):
        return f"; write {json.dumps(str(value))}"
    if accepted == (int,) and type(value) is float and value.is_integer():
        return f"; write {int(value)}"
    if isinstance(value, str):
        try:
            parsed = tomllib.loads(f"value = {value.lower()}")["value"]
        except tomllib.TOMLDecodeError:
            return ""
        if type(parsed) in accepted:
            return f"; write {json.dumps(parsed)}"
    return ""
