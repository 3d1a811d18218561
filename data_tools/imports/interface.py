"""What a foreign format of token files is: tokens in order, in blocks that fit into memory."""

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
"""Types by their codes in Megatron's and TinyLlama's headers; 6 and 7 are floats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBlock:
    """Tokens that follow those of the block before."""

    source: "TokenSource"
    """The file that they come from."""
    offset: int
    """Place of the first one in the file, in bytes."""
    tokens: npt.NDArray[np.integer]
    ends: npt.NDArray[np.int64]
    """Places in `tokens`, ascending, before which a document ends: from 0, where one of the block
    before does, to their number."""


class TokenFiles(Protocol):
    """Files of one kind."""

    @property
    def sources(self) -> list["TokenSource"]:
        """The files, whose headers and sizes are found to fit."""
        ...

    def read_blocks(self) -> Iterator[TokenBlock]:
        """Read all tokens, the sources in order and each to its end."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFormat:
    """A format of token files.

    Attributes:
        option: What `--from` calls it. Several formats may share a name; then their inputs differ
            in what `recognizes` says.
        label: In messages.
        help: What its inputs are.
        recognizes: Whether an input of the command line is of this format.
        open: Opens the inputs, which were made with the tokenizer, and checks headers and sizes of
            all files; raises ConfigError where a file is missing and DataError where one is damaged
            or of another kind.
    """

    option: str
    label: str
    help: str
    recognizes: Callable[[str], bool]
    open: Callable[[list[str], Tokenizer], TokenFiles]


class TokenSource:
    """A file that is hashed as it is read from its start to its end.

    Args:
        path: the file.
        name: its name in the manifest.

    Raises:
        ConfigError: there is no such file.
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
                f"--input {path}: {error.strerror}; give files that are there"
            ) from error

    @property
    def sha256(self) -> str:
        """sha256 of what was read so far."""
        return self._sha256.hexdigest()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Open the file for `read`.

        Raises:
            DataError: it cannot be read, or is longer than what was read.
        """
        try:
            with self.path.open("rb") as self._file:
                yield
                if self._file.read(1):
                    self.fail("the file goes on behind its data")
        except OSError as error:
            self.fail(f"cannot be read ({error.strerror})")

    def read(self, size: int) -> bytes:
        """Read what follows.

        Raises:
            DataError: the file ends before.
        """
        assert self._file is not None
        data = self._file.read(size)
        self.offset += len(data)
        if len(data) < size:
            self.fail("the file ends inside of its data")
        self._sha256.update(data)
        return data

    def fail(self, what: str) -> NoReturn:
        """Raise a DataError that names the place up to which the file was read."""
        raise DataError(
            f"{self.path}: byte {self.offset}: {what}; copy the file again or leave it out"
        )


def read_blocks(
    source: TokenSource, dtype: np.dtype[np.integer], num_tokens: int, ends: npt.NDArray[np.int64]
) -> Iterator[TokenBlock]:
    """Read tokens that follow in an open file.

    Args:
        source: the file.
        dtype: type of the tokens.
        num_tokens: how many.
        ends: ascending places among them, from 1, before which a document ends.
    """
    for start in range(0, num_tokens, BLOCK_TOKENS):
        stop = min(num_tokens, start + BLOCK_TOKENS)
        offset = source.offset
        tokens = np.frombuffer(source.read((stop - start) * dtype.itemsize), dtype=dtype)
        first, last = np.searchsorted(ends, [start, stop], side="right")
        yield TokenBlock(source=source, offset=offset, tokens=tokens, ends=ends[first:last] - start)


def list_files(inputs: list[str], pattern: str) -> list[tuple[Path, str]]:
    """The files of a pattern below folders, sorted, and the other inputs as they are.

    Returns:
        Paths, and names relative to the input.

    Raises:
        ConfigError: a folder has no such file, or a file is named twice.
    """
    found: list[tuple[Path, str]] = []
    for text in inputs:
        path = Path(text)
        inside = sorted(path.rglob(pattern)) if path.is_dir() else [path]
        if not inside:
            raise ConfigError(f"--input {path}: the folder holds no {pattern} file")
        found += [
            (file, str(file.relative_to(path)) if file != path else path.name) for file in inside
        ]
    seen: set[Path] = set()
    for path, _ in found:
        if path.resolve() in seen:
            raise ConfigError(f"--input {path} is named twice; name it once")
        seen.add(path.resolve())
    return found
