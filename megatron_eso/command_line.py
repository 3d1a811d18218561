"""Command lines: errors of one line, and the numbers and paths that several commands take."""

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
    """argparse's parser; an error is one line on stderr, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, without the usage, and exit."""
        wait_for_first_rank()
        line = " ".join(message.removeprefix("argument ").split())
        self.exit(2, f"error: {line}; see `{self.prog} --help`\n")


def quote(text: str) -> str:
    """The text that a user wrote, shortened, for an error."""
    short = text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}..."
    return short if short.strip() and short.isprintable() else repr(short)


def count(low: int = 0, high: int = MAX_COUNT) -> Callable[[str], int]:
    """Return a type of argument: a whole number of this range; `1e9` is one."""

    def parse(text: str) -> int:
        try:
            value = parse_count(text)
        except ValueError:
            value = -1
        if not low <= value <= high:
            top = f" to {high}" if high < MAX_COUNT else ""
            raise argparse.ArgumentTypeError(f"{quote(text)} is no whole number from {low}{top}")
        return value

    return parse


def real(text: str) -> float:
    """A type of argument: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{quote(text)} is no number")
    return value


def positive_real(text: str) -> float:
    """A type of argument: a finite number above 0."""
    value = real(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{quote(text)} is not above 0")
    return value


def real_from_0(text: str) -> float:
    """A type of argument: a finite number of 0 or more."""
    value = real(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{quote(text)} is negative")
    return value


def share(text: str) -> float:
    """A type of argument: a number between 0 and 1, neither of them."""
    value = real(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{quote(text)} is not between 0 and 1")
    return value


def existing_path(text: str) -> Path:
    """A type of argument: a file or folder that exists."""
    path = Path(text)
    try:
        if not text:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        path.stat()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{quote(text)}: {error.strerror}") from None
    return path


def new_path(text: str) -> Path:
    """A type of argument: a path with a name of its own, which may exist or not."""
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
