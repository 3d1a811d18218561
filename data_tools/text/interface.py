"""What a format of text files is, and what goes through it: slices of files, units, documents.

A slice of a file is read as *units*, about 1 MiB of text each: reading is cheap and done by one
process. A unit is parsed to *documents*, which is done by many processes.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOptions:
    """How documents lie in the files, and what to do about those that are broken."""

    text_key: str = "text"
    standard_input: str = "jsonl"
    """Name of the format of standard input."""
    document_separator: str | None = None
    """Text between the documents of a `.txt` file; None: each file is a document."""
    on_error: OnError = "stop"
    cuts_documents: bool = True
    """Long documents of `.txt` files may be cut after newlines and encoded in parts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFile:
    """A file to read documents from."""

    path: Path | None
    """None for standard input."""
    name: str
    """Path relative to the input that named it; goes into the manifest."""
    kind: str
    """Name of its format."""
    compression: Compression | None
    """Compression of the file; None for standard input, whose first bytes show it."""
    num_bytes: int
    """Size on the disk; 0 for standard input."""

    @property
    def label(self) -> str:
        """The file in messages."""
        return "standard input" if self.path is None else str(self.path)

    def check_size(self, num_bytes: int) -> None:
        """Check that the file still has its size.

        Raises:
            DataError: it has another.
        """
        if num_bytes != self.num_bytes:
            raise DataError(
                f"{self.path} had {self.num_bytes} bytes at the start and has {num_bytes} now; "
                "start again when nothing writes to the input any more"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """A file, or of a large file the lines whose first byte is in a range."""

    file: int
    """Number of the input file."""
    start: int
    stop: int
    """Bytes of the file as it lies on the disk."""

    @property
    def num_bytes(self) -> int:
        """Size of the range."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRead:
    """What a slice was made of."""

    num_bytes: int
    sha256: str
    """Hash of the bytes of the slice, as they lie on the disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A part of a slice: some lines of JSONL, some rows of Parquet, text files or parts of one."""

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
    """`data` begins inside a document of the unit before."""
    ends_document: bool = True
    """Whether the last document ends here; else it continues in the next unit."""
    document_hash: int = 0
    """Hash of the whole document that began in an earlier unit and ends in this one."""
    problems: tuple[Problem, ...] = ()
    """What is wrong with the part of the file, as reading showed."""
    raw_bytes: int = 0
    """Bytes of the input that were read for this unit."""
    digest: int = 0
    """Hash of the data of the units of the span up to this one."""
    source: SourceRead | None = None
    """What the slice was made of; in its last unit only."""

    def name_problem(self, line: int, what: str) -> Problem:
        """What is wrong with a line of the unit."""
        return Problem(path=self.path, line=line, what=what, start=self.start)


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A document, or a part of one that goes over several units."""

    text: bytes
    """The text in UTF-8."""
    ends: bool = True
    """Whether the document ends here; else it continues in the next unit."""
    hash: int = 0
    """Hash of the whole document, where it ends."""


def hash_document(text: bytes) -> int:
    """The hash of a document's text, a 128-bit integer: for splits, and to know equal documents."""
    return xxhash.xxh3_128_intdigest(text)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFormat:
    """A format of text files.

    Attributes:
        name: In plans of builds, never changed.
        suffixes: Of its files.
        is_compressible: Its files may also be compressed as a whole (`.gz`, `.zst`).
        is_sliceable: A large file that is not compressed may be cut into slices of lines.
        read: Yields the units of a slice; takes the file, the slice, its index in the span, the
            options, and the size of a unit. Even an empty slice ends with a unit that has its
            `source`.
        parse: Yields the documents of a unit, empty ones too, and the problems in it.
    """

    name: str
    suffixes: tuple[str, ...]
    is_compressible: bool
    is_sliceable: bool
    read: Callable[[InputFile, Slice, int, TextOptions, int], Iterator[Unit]]
    parse: Callable[[Unit, TextOptions], Iterator[Document | Problem]]
