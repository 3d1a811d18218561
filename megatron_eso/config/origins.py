"""Where the values of a configuration were set, for the errors that refuse them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from megatron_eso.config.sections import Config
from megatron_eso.errors import ConfigError

Origins = Mapping[str, str]
"""Where a key was set: a file or the command line; a key that is missing has its default."""

COMMAND_LINE = "command line"
DEFAULT_ORIGIN = "default"


_MAX_SHOWN_CHARACTERS = 200


def format_value(value: Any) -> str:
    """Return a value as the configuration writes it, cut where it is long."""
    if value is None:
        return "not set"
    try:
        text = json.dumps(value, default=str)
    except ValueError:  # Python converts no number of more than 4300 digits
        return "a number of thousands of digits"
    return shorten(text)


def shorten(text: str) -> str:
    """Return what a user wrote, cut where it is too long for an error."""
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[:_MAX_SHOWN_CHARACTERS]}..."


def refuse_value(origin: str, key: str, value: Any, remedy: str) -> NoReturn:
    """Refuse a value.

    Raises:
        ConfigError: One line with origin, key, value as TOML, and remedy.
    """
    raise ConfigError(f"{origin}: {key} = {format_value(value)}: {remedy}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedConfig:
    """A configuration with the origins of its values: what a rule reads, and refuses."""

    config: Config
    origins: Origins

    def find_origin(self, key: str) -> str:
        """Return where `section.name` was set."""
        return self.origins.get(key, DEFAULT_ORIGIN)

    def refuse(self, key: str, remedy: str) -> NoReturn:
        """Refuse the value of `section.name`, errors as for `refuse_value`."""
        refuse_value(self.find_origin(key), key, self.config.get(key), remedy)

    def require(self, holds: bool, key: str, remedy: str) -> None:
        """Refuse the value of `section.name` unless a rule holds."""
        if not holds:
            self.refuse(key, remedy)
