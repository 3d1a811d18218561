"""The interface of a text format, and its values: slices of files, units and documents.

One process reads a slice of a file as *units* of about 1 MiB of text, which is cheap. Many
processes parse the units to *documents*.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import xxhash

from data_tools.text.problems import Problem
from megatron_eso.compression import Compression
from megatron_eso.errors import DataError

OnError = Literal["stop", "skip"]
STANDARD_INPUT_LABEL = "standard input"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOptions:
    """How documents lie in the files, and whether broken ones stop the work."""

    text_key: str = "text"
    standard_input: str = "jsonl"
    """Name of the format of standard input."""
    document_separator: str | None = None
    """Text between the documents of a `.txt` file; None: each file is one document."""
    on_error: OnError = "stop"
    cuts_documents: bool = True
    """Whether long documents of `.txt` files may be cut after newlines and encoded in parts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFile:
    """A file to read documents from."""

    path: Path | None
    """None for standard input."""
    name: str
    """Path relative to the `--input` that named it, as in the manifest."""
    kind: str
    """Name of its format."""
    compression: Compression | None
    """Compression of the file; that of standard input follows from its first bytes."""
    num_bytes: int
    """Size on the disk; 0 for standard input."""

    @property
    def label(self) -> str:
        """Name of the file in messages."""
        return STANDARD_INPUT_LABEL if self.path is None else str(self.path)

    def check_size(self, num_bytes: int) -> None:
        """Check that the file still has the size that it had at the start.

        Raises:
            DataError: The size has changed.
        """
        if num_bytes != self.num_bytes:
            raise DataError(
                f"{self.path} had {self.num_bytes} bytes at the start and has {num_bytes} now; "
                "start again when no process writes to the input"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """A whole file, or the lines of a large file whose first byte is in a range."""

    file: int
    """Number of the input file."""
    start: int
    stop: int
    """Range of bytes of the file on the disk."""

    @property
    def num_bytes(self) -> int:
        """Size of the range."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRead:
    """Size and hash of a slice that was read."""

    num_bytes: int
    sha256: str
    """Hash of the slice's bytes on the disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A part of a slice: lines of JSONL, rows of Parquet, or a text file or a part of it."""

    slice: int
    """Index of the slice in its span."""
    path: str
    """Name of the file in messages."""
    kind: str
    """Name of the format."""
    data: bytes
    number: int = 0
    """Number of the unit in the span."""
    first_line: int = 1
    """Number of the first line of `data`, counted from 1 at the byte `start` of the file."""
    start: int = 0
    row_bytes: tuple[int, ...] = ()
    """Parquet: the lengths of the texts in `data`."""
    continues: bool = False
    """Whether `data` begins inside a document of the unit before."""
    ends_document: bool = True
    """Whether the last document ends in this unit, and not in a later one."""
    document_hash: int = 0
    """Hash of a whole document that began in an earlier unit and ends in this one."""
    problems: tuple[Problem, ...] = ()
    """Problems that were found while the unit was read."""
    raw_bytes: int = 0
    """Bytes of the input that were read for this unit."""
    digest: int = 0
    """Hash of the data of the span's units up to this one."""
    source: SourceRead | None = None
    """Size and hash of the slice; in its last unit only."""

    def name_problem(self, line: int, what: str) -> Problem:
        """Return a problem of a line of the unit."""
        return Problem(path=self.path, line=line, what=what, start=self.start)


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A document, or the part of it that lies in one unit."""

    text: bytes
    """The text in UTF-8."""
    ends: bool = True
    """Whether the document ends in this unit, and not in a later one."""
    hash: int = 0
    """Hash of the whole document, in the part that ends it."""


def hash_document(text: bytes) -> int:
    """Return the 128-bit hash of a document's text, by which splits and duplicates are found."""
    return xxhash.xxh3_128_intdigest(text)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFormat:
    """A format of text files.

    Attributes:
        name: Name in build plans, which never changes.
        suffixes: Suffixes of its files.
        is_compressible: Whether its files may be compressed as a whole (`.gz`, `.zst`).
        is_sliceable: Whether a large uncompressed file may be cut into slices of lines.
        read: Yields the units of a slice; takes the file, the slice, its index in the span, the
            options, and the size of a unit. Every slice, even an empty one, ends with a unit that
            has its `source`.
        parse: Yields the documents of a unit, also empty ones, and the problems in it.
    """

    name: str
    suffixes: tuple[str, ...]
    is_compressible: bool
    is_sliceable: bool
    read: Callable[[InputFile, Slice, int, TextOptions, int], Iterator[Unit]]
    parse: Callable[[Unit, TextOptions], Iterator[Document | Problem]]
