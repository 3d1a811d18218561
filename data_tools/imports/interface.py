"""The interface of a token format of another program: tokens in order, in blocks."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.errors import ConfigError, DataError

BLOCK_TOKENS = 2**20

DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Dtypes by their codes in Megatron's and TinyLlama's headers; 6 and 7 are floats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBlock:
    """Consecutive tokens of a file, which fit into memory."""

    source: "TokenSource"
    """The file of the tokens."""
    offset: int
    """Offset of the first token in the file, in bytes."""
    tokens: npt.NDArray[np.integer]
    ends: npt.NDArray[np.int64]
    """Indices in `tokens`, ascending, before which a document ends; index 0 is for the end of a
    document in the block before, the number of tokens for an end at the end of this block."""


class TokenFiles(Protocol):
    """Token files of one format."""

    @property
    def sources(self) -> list["TokenSource"]:
        """The files, whose headers and sizes are checked."""
        ...

    def read_blocks(self) -> Iterator[TokenBlock]:
        """Yield all tokens, of the sources in order and each to its end."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFormat:
    """A format of token files.

    Attributes:
        option: Name for `--from`. Formats may share a name if `recognizes` distinguishes their
            inputs.
        label: Name in messages.
        help: Describes its inputs.
        recognizes: Returns whether an input of the command line is of this format.
        open: Opens the inputs, given the tokenizer that made them, and checks headers and sizes of
            all files; raises ConfigError for a missing file, and DataError for one that is damaged
            or of another kind.
    """

    option: str
    label: str
    help: str
    recognizes: Callable[[str], bool]
    open: Callable[[list[str], Tokenizer], TokenFiles]


class TokenSource:
    """A file that is hashed while it is read from its start to its end.

    Args:
        path: Path of the file.
        name: Name of the file in the manifest.

    Raises:
        ConfigError: The file does not exist.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self.offset = 0
        self._file: BinaryIO | None = None
        self._sha256 = hashlib.sha256()
        try:
            self.num_bytes = path.stat().st_size
        except OSError as error:
            raise ConfigError(
                f"--input {path}: {error.strerror}; name a file that exists"
            ) from error

    @property
    def sha256(self) -> str:
        """Hash of the bytes that were read so far."""
        return self._sha256.hexdigest()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Open the file for `read`.

        Raises:
            DataError: The file cannot be read, or is longer than its data.
        """
        try:
            with self.path.open("rb") as self._file:
                yield
                if self._file.read(1):
                    self.fail("the file is longer than its data")
        except OSError as error:
            self.fail(f"cannot be read ({error.strerror})")

    def read(self, size: int) -> bytes:
        """Read the next `size` bytes.

        Raises:
            DataError: The file is shorter.
        """
        assert self._file is not None
        data = self._file.read(size)
        self.offset += len(data)
        if len(data) < size:
            self.fail("the file is shorter than its data")
        self._sha256.update(data)
        return data

    def fail(self, what: str) -> NoReturn:
        """Raise a DataError with the byte up to which the file was read."""
        raise DataError(
            f"{self.path}: byte {self.offset}: {what}; copy the file again or leave it out"
        )


def read_blocks(
    source: TokenSource, dtype: np.dtype[np.integer], num_tokens: int, ends: npt.NDArray[np.int64]
) -> Iterator[TokenBlock]:
    """Yield the next tokens of an open file in blocks.

    Args:
        source: The open file.
        dtype: Dtype of the tokens.
        num_tokens: Number of tokens to read.
        ends: Indices among these tokens, ascending from 1, before which a document ends, int64.
    """
    for start in range(0, num_tokens, BLOCK_TOKENS):
        stop = min(num_tokens, start + BLOCK_TOKENS)
        offset = source.offset
        tokens = np.frombuffer(source.read((stop - start) * dtype.itemsize), dtype=dtype)
        first, last = np.searchsorted(ends, [start, stop], side="right")
        yield TokenBlock(source=source, offset=offset, tokens=tokens, ends=ends[first:last] - start)


def list_files(inputs: list[str], pattern: str) -> list[tuple[Path, str]]:
    """List the files that match a pattern below folders, sorted, and the inputs that are files.

    Returns:
        The paths, each with its name relative to the input.

    Raises:
        ConfigError: A folder has no such file, or a file is named twice.
    """
    found: list[tuple[Path, str]] = []
    for text in inputs:
        path = Path(text)
        inside = sorted(path.rglob(pattern)) if path.is_dir() else [path]
        if not inside:
            raise ConfigError(f"--input {path}: the folder holds no {pattern} file; name another")
        found += [
            (file, str(file.relative_to(path)) if file != path else path.name) for file in inside
        ]
    seen: set[Path] = set()
    for path, _ in found:
        if path.resolve() in seen:
            raise ConfigError(f"--input {path}: is named twice; name it once")
        seen.add(path.resolve())
    return found
