"""What is wrong with the input, named so that a user finds the place."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

INVALID_UTF8 = "invalid UTF-8; convert the file"

_READ_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A line, a row or a file of the input that gives no documents."""

    path: str
    line: int
    """Number of the line or row, from 1; 0 for the file as a whole."""
    what: str
    """What is wrong and what to do about it."""
    start: int = 0
    """The byte of the file from which lines are counted: each slice has a line 1."""
    is_row: bool = False

    def describe(self) -> str:
        """One line `path:line: what`; reads the file up to `start`."""
        if not self.line:
            return f"{self.path}: {self.what}"
        if self.is_row:
            return f"{self.path}: row {self.line}: {self.what}"
        line = self.line + (_count_newlines(self.path, self.start) if self.start else 0)
        return f"{self.path}:{line}: {self.what}"


def find_invalid_utf8(text: bytes) -> int | None:
    """The place of the first byte that is no UTF-8; None if there is none."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return None


@lru_cache
def _count_newlines(path: str, stop: int) -> int:
    count = 0
    with Path(path).open("rb") as stream:
        while stop and (data := stream.read(min(stop, _READ_BYTES))):
            count += data.count(b"\n")
            stop -= len(data)
    return count
