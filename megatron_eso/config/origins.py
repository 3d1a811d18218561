"""Origins of values: where each was set, for the errors that refuse it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from megatron_eso.config.sections import Config
from megatron_eso.errors import ConfigError

Origins = Mapping[str, str]
"""Where each key was set: a file or the command line; keys with their default are missing."""

COMMAND_LINE = "command line"
DEFAULT_ORIGIN = "default"


_MAX_SHOWN_CHARACTERS = 200


def format_value(value: Any) -> str:
    """Return a value in the notation of the configuration, shortened for an error."""
    if value is None:
        return "not set"
    try:
        text = json.dumps(value, default=str)
    except ValueError:  # Python does not convert numbers of more than 4300 digits
        return "a number of thousands of digits"
    return shorten(text)


def shorten(text: str) -> str:
    """Return a text of the user, shortened for an error."""
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[:_MAX_SHOWN_CHARACTERS]}..."


def prefix_origin(origins: Origins | None, key: str) -> str:
    """Return how an error begins that refuses a key: `origin: `, or nothing without `origins`."""
    return "" if origins is None else f"{origins.get(key, DEFAULT_ORIGIN)}: "


def refuse_value(origin: str, key: str, value: Any, remedy: str) -> NoReturn:
    """Refuse a value.

    Raises:
        ConfigError: Always; one line with origin, key, value and remedy.
    """
    raise ConfigError(f"{origin}: {key} = {format_value(value)}: {remedy}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedConfig:
    """A configuration with the origins of its values, for rules that read and refuse them."""

    config: Config
    origins: Origins

    def find_origin(self, key: str) -> str:
        """Return where the key `section.name` was set."""
        return self.origins.get(key, DEFAULT_ORIGIN)

    def refuse(self, key: str, remedy: str) -> NoReturn:
        """Refuse the value of `section.name`.

        Raises:
            ConfigError: Always, as in `refuse_value`.
        """
        refuse_value(self.find_origin(key), key, self.config.get(key), remedy)

    def require(self, holds: bool, key: str, remedy: str) -> None:
        """Refuse the value of `section.name` unless a rule holds.

        Raises:
            ConfigError: The rule does not hold.
        """
        if not holds:
            self.refuse(key, remedy)
