"""Reads Megatron's pairs of files: `.bin` with all tokens, `.idx` with sequences and documents.

The index is a header (magic, version, code of the dtype, number of sequences, number of document
bounds), then the length of each sequence (int32), its offset in the `.bin` in bytes (int64), the
bounds of the documents as numbers of sequences (int64, from 0), and for multimodal data one byte
per sequence. Source: megatron.core.datasets.indexed_dataset.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.imports.interface import (
    DTYPES,
    TokenBlock,
    TokenFormat,
    TokenSource,
    list_files,
    read_blocks,
)
from megatron_eso.errors import DataError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\0\0"
_INDEX_ENTRIES = 2**18


class MegatronFiles:
    """Pairs of `.bin` and `.idx`.

    Args:
        inputs: Prefixes of pairs, one file of each pair, or folders that are searched.

    Raises:
        ConfigError: A file is missing.
        DataError: An index is damaged, or does not fit its `.bin`.
    """

    def __init__(self, inputs: list[str]) -> None:
        prefixes = [text.removesuffix(".bin").removesuffix(".idx") for text in inputs]
        named = [
            text if Path(text).is_dir() else f"{prefix}.idx"
            for text, prefix in zip(inputs, prefixes, strict=True)
        ]
        self._pairs = []
        for path, name in list_files(named, "*.idx"):
            index = TokenSource(path, name)
            data = TokenSource(path.with_suffix(".bin"), name.removesuffix(".idx") + ".bin")
            self._pairs.append((_Index(index, data), data))

    @property
    def sources(self) -> list[TokenSource]:
        """The files, each index before its data."""
        return [source for index, data in self._pairs for source in (index.source, data)]

    def read_blocks(self) -> Iterator[TokenBlock]:
        """Yield all tokens; see `TokenFiles.read_blocks`."""
        for index, data in self._pairs:
            index.hash()
            with data.opened():
                for num_tokens, ends in index.read():
                    yield from read_blocks(data, index.dtype, num_tokens, ends)


class _Index:
    """An `.idx` file, whose arrays are read in parts, side by side."""

    def __init__(self, source: TokenSource, data: TokenSource) -> None:
        self.source = source
        if source.num_bytes < _HEADER.size:
            source.fail("the index is shorter than its header")
        with source.path.open("rb") as file:
            header = file.read(_HEADER.size)
        # The header, then the size that it implies.
        magic, version, code, self._num_sequences, self._num_bounds = _HEADER.unpack(header)
        if magic != _MAGIC:
            source.fail(f"begins with {magic!r}, not with {_MAGIC!r} as Megatron's index does")
        if version != 1 or code not in DTYPES:
            source.fail(f"version {version} or dtype code {code} is not known for tokens")
        self.dtype: np.dtype[np.integer] = np.dtype(DTYPES[code])
        self._pointers_at = _HEADER.size + 4 * self._num_sequences
        self._bounds_at = self._pointers_at + 8 * self._num_sequences
        end = self._bounds_at + 8 * self._num_bounds
        if source.num_bytes not in (end, end + self._num_sequences):
            source.fail(
                f"the index has {source.num_bytes} bytes, not {end} as for its "
                f"{self._num_sequences} sequences and {self._num_bounds} bounds of documents"
            )
        self._check_data(data)

    def hash(self) -> None:
        """Read the file to its end for its hash."""
        with self.source.opened():
            while self.source.offset < self.source.num_bytes:
                self.source.read(min(2**24, self.source.num_bytes - self.source.offset))

    def read(self) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Yield numbers of consecutive tokens, each with the indices before which a document ends.

        Raises:
            DataError: A sequence does not follow the one before it, or bounds descend.
        """
        offset = 0
        bound = self._check_bounds()
        for first in range(0, self._num_sequences, _INDEX_ENTRIES):
            stop = min(self._num_sequences, first + _INDEX_ENTRIES)
            lengths = self._read(_HEADER.size, "<i4", first, stop).astype(np.int64)
            ends = np.cumsum(lengths)
            pointers = self._read(self._pointers_at, "<i8", first, stop)
            wrong = (lengths < 0) | (pointers != offset + (ends - lengths) * self.dtype.itemsize)
            if wrong.any():
                number = first + int(np.argmax(wrong))
                self._fail(
                    self._pointers_at + 8 * number,
                    f"sequence {number} does not follow the one before it",
                )
            offset += int(ends[-1]) * self.dtype.itemsize
            bounds, bound = self._read_bounds(bound, stop)
            inside = ends[bounds[bounds > first] - first - 1]
            yield int(ends[-1]), np.unique(inside[inside > 0])

    def _check_data(self, data: TokenSource) -> None:
        expected = 0
        if self._num_sequences:
            last = self._num_sequences - 1
            length = self._read(_HEADER.size, "<i4", last, last + 1)[0]
            pointer = self._read(self._pointers_at, "<i8", last, last + 1)[0]
            expected = int(pointer) + int(length) * self.dtype.itemsize
        if data.num_bytes != expected:
            raise DataError(
                f"{data.path}: byte {min(data.num_bytes, expected)}: the file has "
                f"{data.num_bytes} bytes, its index {self.source.path} states {expected}; copy "
                "both again"
            )

    def _check_bounds(self) -> int:
        """Return the number of the first bound that ends a document."""
        edges = [
            int(self._read(self._bounds_at, "<i8", number, number + 1)[0])
            for number in (0, self._num_bounds - 1)
            if self._num_bounds
        ]
        if edges != [0, self._num_sequences]:
            self._fail(
                self._bounds_at,
                f"the first and last bounds are {edges}, not 0 and {self._num_sequences}",
            )
        return 1

    def _read_bounds(self, bound: int, stop: int) -> tuple[npt.NDArray[np.int64], int]:
        """Return the bounds from number `bound` up to sequence `stop`, and the next number."""
        parts = []
        while bound < self._num_bounds:
            until = min(self._num_bounds, bound + _INDEX_ENTRIES)
            part = self._read(self._bounds_at, "<i8", bound - 1, until)
            falls = np.diff(part) < 0
            if falls.any():
                number = bound + int(np.argmax(falls))
                self._fail(
                    self._bounds_at + 8 * number,
                    f"bound {number} of documents is below the one before it",
                )
            inside = part[1:][part[1:] <= stop]
            parts.append(inside)
            bound += len(inside)
            if bound < until:
                break
        return np.concatenate([np.empty(0, dtype=np.int64), *parts]), bound

    def _read(self, offset: int, dtype: str, first: int, stop: int) -> npt.NDArray[np.int64]:
        """Read entries `first` to `stop` of the array at byte `offset` of the file."""
        size = np.dtype(dtype).itemsize
        found: npt.NDArray[np.int64] = np.fromfile(
            self.source.path, dtype=dtype, count=stop - first, offset=offset + size * first
        )
        return found

    def _fail(self, offset: int, what: str) -> None:
        self.source.offset = offset
        self.source.fail(what)


MEGATRON = TokenFormat(
    option="megatron",
    label="Megatron's files",
    help=".bin and .idx",
    recognizes=lambda text: True,
    open=lambda inputs, tokenizer: MegatronFiles(inputs),
)
