"""Rules of single values: strict types, where only a whole number becomes a float; ranges; paths.

The error for a key or section that does not exist suggests the closest one.
"""

import difflib
import json
import math
import os
import tomllib
import typing
from typing import Any, NoReturn

from megatron_eso.config.keys import Key, describe_interval, is_inside
from megatron_eso.config.origins import (
    COMMAND_LINE,
    TracedConfig,
    format_value,
    refuse_value,
    shorten,
)
from megatron_eso.config.sections import KEYS, SECTIONS
from megatron_eso.errors import ConfigError

MAX_INTEGER = 2**63 - 1
MAX_NAME_BYTES = 255
TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    tuple[str, ...]: "a list of strings",
    tuple[float, ...]: "a list of numbers",
}


def parse_override(key: str, text: str) -> Any:
    """Parse the text of `key=text` as TOML; keep it where it is not TOML or the key is a string."""
    document = parse_toml(f"value = {text}")
    if document is None:
        return text
    value = document["value"]
    accepted = find_key(key, COMMAND_LINE).accepted_types
    is_list = isinstance(value, list) and find_item_type(accepted) is not None
    wants_text = str in accepted and not isinstance(value, str) and not is_list
    return text if len(document) > 1 or wants_text else value


def parse_toml(text: str) -> dict[str, Any] | None:
    """Parse a line of TOML; return None where it is not TOML or too large for Python."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError):
        return None


def check_value(path: str, value: Any, origin: str) -> Any:
    """Return the value in the type of its key; lists become tuples.

    Raises:
        ConfigError: The key does not exist, or the value has another type.
    """
    key = find_key(path, origin)
    item_type = find_item_type(key.accepted_types)
    if item_type is not None and isinstance(value, list | tuple):
        return tuple(check_scalar(path, item, origin, (item_type,)) for item in value)
    value = check_scalar(path, value, origin, key.accepted_types)
    if key.choices and value not in key.choices:
        choices = ", ".join(json.dumps(choice) for choice in key.choices)
        refuse_value(origin, path, value, f"must be one of {choices}")
    return value


def check_scalar(path: str, value: Any, origin: str, accepted: tuple[Any, ...]) -> Any:
    """Return a value, or an item of a list, in an accepted type."""
    if type(value) is int and not -MAX_INTEGER <= value <= MAX_INTEGER:
        refuse_value(origin, path, value, "does not fit into 64 bits")
    if float in accepted and type(value) is int:
        value = float(value)
    if type(value) not in accepted:
        expected = " or ".join(TYPE_NAMES[accept] for accept in accepted)
        remedy = f"expects {expected}{suggest_value(path, value, accepted)}"
        refuse_value(origin, path, value, remedy)
    if isinstance(value, float) and not math.isfinite(value):
        refuse_value(origin, path, value, "must be finite")
    return value


def find_item_type(accepted: tuple[Any, ...]) -> type | None:
    """Return the item type of an accepted list; None where a list is not accepted."""
    items = [typing.get_args(member)[0] for member in accepted if typing.get_origin(member)]
    return items[0] if items else None


def suggest_value(path: str, value: Any, accepted: tuple[Any, ...]) -> str:
    """Suggest what to write instead; empty where the value does not show it."""
    if accepted == (str,):
        return f"; write {format_value(str(value))}"
    if accepted == (int,) and type(value) is float and value.is_integer():
        largest = KEYS[path].largest
        return f"; write {int(value)}" if value <= largest else f" of at most {largest}"
    if isinstance(value, str):
        parsed = (parse_toml(f"value = {value.lower()}") or {}).get("value")
        if type(parsed) in accepted:
            return f"; write {json.dumps(parsed)}"
    return ""


def check_ranges(traced: TracedConfig) -> None:
    """Refuse numbers outside the ranges of their keys."""
    for path, key in KEYS.items():
        value = traced.config.get(path)
        if value is None:
            continue
        if not is_inside(value, key.interval):
            otherwise = ", or leave it out" if key.is_optional else ""
            traced.refuse(path, f"must be {describe_interval(key.interval)}{otherwise}")
        for number in value if isinstance(value, tuple) else (value,):
            is_number = isinstance(number, int | float)
            is_allowed = not is_number or number <= key.largest
            traced.require(is_allowed, path, f"use at most {key.largest}")


def check_locations(traced: TracedConfig) -> None:
    """Refuse what cannot be the name of a file or folder.

    `check_config` leaves this out, because run directories that were converted name no data.
    """
    for path, key in KEYS.items():
        value = traced.config.get(path)
        if key.location is None or value is None:
            continue
        for name in (value,) if isinstance(value, str) else value:
            traced.require(name.strip() != "", path, "names nothing; name a folder")
            traced.require("\0" not in name, path, "holds a NUL character; leave it out")
            traced.require(
                key.location.may_be_url or "://" not in name,
                path,
                "is a URL; name a folder that is mounted on this machine",
            )
            longest = max(len(os.fsencode(part)) for part in name.split("/"))
            traced.require(
                longest <= MAX_NAME_BYTES,
                path,
                f"has a part of {longest} bytes; file systems take names of {MAX_NAME_BYTES}",
            )


def find_key(path: str, origin: str) -> Key:
    """Find the key `section.name`.

    Raises:
        ConfigError: The section or key does not exist.
    """
    section, _, name = path.partition(".")
    if name and section not in SECTIONS:
        refuse_section(section, origin)
    if path not in KEYS:
        refuse_key(path, origin)
    return KEYS[path]


def refuse_section(name: str, origin: str) -> NoReturn:
    """Refuse an unknown section; the error suggests the closest one."""
    close = difflib.get_close_matches(name, SECTIONS, n=1)
    hint = f"did you mean [{close[0]}]?" if close else f"sections are {', '.join(SECTIONS)}"
    raise ConfigError(f"{origin}: [{shorten(name)}] is not a section: {hint}")


def refuse_key(path: str, origin: str) -> NoReturn:
    """Refuse an unknown key; the error suggests the closest one of its section, or of all."""
    section, _, name = path.rpartition(".")
    shown = shorten(path)
    every = {key.path: key.name for key in KEYS.values()}
    own = {other: known for other, known in every.items() if other == f"{section}.{known}"}
    for candidates in (own, every):
        close = difflib.get_close_matches(name, candidates.values(), n=1, cutoff=0.7)
        if close:
            found = [other for other, known in candidates.items() if known == close[0]]
            raise ConfigError(
                f"{origin}: {shown} is not a key: did you mean {' or '.join(sorted(found))}?"
            )
    known_keys = "see docs/configuration.md"
    if own:
        known_keys = f"keys of [{section}] are {', '.join(own.values())}"
    raise ConfigError(f"{origin}: {shown} is not a key: {known_keys}")
