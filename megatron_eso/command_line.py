"""Command lines: errors of one line, and the types of numbers and paths in arguments."""

import argparse
import errno
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_eso.quantities import parse_count
from megatron_eso.ranks import wait_for_first_rank

MAX_COUNT = 2**63 - 1
_MAX_QUOTED = 200


class CommandLine(argparse.ArgumentParser):
    """A parser of argparse whose errors are one line on stderr, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print the error without the usage, and exit with code 2."""
        wait_for_first_rank()
        line = " ".join(message.removeprefix("argument ").split())
        self.exit(2, f"error: {line}; see `{self.prog} --help`\n")


def add_layers(parser: argparse.ArgumentParser) -> None:
    """Add the argument `layers`: the configuration of a run."""
    parser.add_argument(
        "layers",
        nargs="+",
        metavar="CONFIG.toml|section.key=value",
        help="configuration layers in order; the later value of a key wins",
    )


def quote(text: str) -> str:
    """Return a text of the user, shortened for an error."""
    short = text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}..."
    return short if short.strip() and short.isprintable() else repr(short)


def count(low: int = 0, high: int = MAX_COUNT) -> Callable[[str], int]:
    """Return a parser of whole numbers from `low` to `high`; it accepts `1e9`."""

    def parse(text: str) -> int:
        try:
            value = parse_count(text)
        except ValueError:
            value = -1
        if not low <= value <= high:
            top = f" to {high}" if high < MAX_COUNT else ""
            raise argparse.ArgumentTypeError(f"{quote(text)} is not a whole number from {low}{top}")
        return value

    return parse


def real(text: str) -> float:
    """Parse a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{quote(text)} is not a number")
    return value


def positive_real(text: str) -> float:
    """Parse a finite number above 0."""
    value = real(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{quote(text)} is not above 0")
    return value


def real_from_0(text: str) -> float:
    """Parse a finite number of 0 or more."""
    value = real(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{quote(text)} is negative")
    return value


def share(text: str) -> float:
    """Parse a number between 0 and 1, without 0 and 1."""
    value = real(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{quote(text)} is not between 0 and 1")
    return value


def existing_path(text: str) -> Path:
    """Parse the path of an existing file or folder."""
    path = Path(text)
    try:
        if not text:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        path.stat()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{quote(text)}: {error.strerror}") from None
    return path


def possible_path(text: str) -> str:
    """Return a path that a file can have, whether or not there is one."""
    try:
        Path(text).stat()
    except FileNotFoundError:
        return text
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{quote(text)}: {error.strerror}") from None
    return text


def new_path(text: str) -> Path:
    """Parse a path that ends with the name of a file or folder, which may exist."""
    path = Path(text)
    if path.name in ("", ".."):
        raise argparse.ArgumentTypeError(f"{quote(text)} names no new file or folder")
    try:
        path.stat()
    except FileNotFoundError:
        return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{quote(text)}: {error.strerror}") from None
    return path
