"""Problems of the input, with file and line."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

INVALID_UTF8 = "invalid UTF-8; convert the file"

_READ_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A line, row or file of the input that yields no document."""

    path: str
    line: int
    """Number of the line or row, from 1; 0 for the file as a whole."""
    what: str
    """The problem and its remedy."""
    start: int = 0
    """Byte of the file from which lines are counted: the lines of each slice start at 1."""
    is_row: bool = False

    def describe(self) -> str:
        """Return `path:line: what`; this reads the file up to `start` to count its lines."""
        if not self.line:
            return f"{self.path}: {self.what}"
        if self.is_row:
            return f"{self.path}: row {self.line}: {self.what}"
        line = self.line + (_count_newlines(self.path, self.start) if self.start else 0)
        return f"{self.path}:{line}: {self.what}"


def find_invalid_utf8(text: bytes) -> int | None:
    """Return the index of the first byte that is not UTF-8; None if all are."""
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
