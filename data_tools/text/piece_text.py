"""The text of a piece of the input, in blocks of one size; raw bytes are hashed on the way."""

import hashlib
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import BinaryIO

from data_tools.text.decompression import DamageError, decompress, tell_compression
from data_tools.text.inputs import InputFile, Piece

_RAW_BYTES = 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class PieceText:
    """Reads a piece of a JSONL or text file.

    Attributes:
        start: byte of the file at which the text begins.
        num_bytes: raw bytes of the piece that were read so far.
        damage: after the last block, why the text ends there; None if it is whole.
        is_empty: after the last block, there is no text at all.
    """

    def __init__(self, file: InputFile, piece: Piece, stream: BinaryIO) -> None:
        self._file = file
        self._piece = piece
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self.start = piece.start
        self.num_bytes = 0
        self.damage: str | None = None
        self.is_empty = False

    def read_blocks(self, block_bytes: int) -> Iterator[tuple[bytes, bool]]:
        """Blocks of this size, and whether it is the last one, which is smaller or empty.

        Raises:
            DataError: the file is not the one that was planned with.
            OSError: it cannot be read.
        """
        self._check_size()
        raw = self._read_raw()
        # What is held back is never empty, so that the last block is known as such.
        pending = bytearray()
        is_first = self._piece.start == 0
        try:
            for text in self._read_text(raw):
                pending += text
                while len(pending) > block_bytes:
                    block = bytes(pending[:block_bytes])
                    del pending[:block_bytes]
                    yield block.removeprefix(_BYTE_ORDER_MARK if is_first else b""), False
                    is_first = False
        except DamageError as damage:
            self.damage = str(damage)
            for _ in raw:
                pass
        self._check_size()
        block = bytes(pending).removeprefix(_BYTE_ORDER_MARK if is_first else b"")
        self.is_empty = is_first and not block and self.damage is None
        yield block, True

    def sha256(self) -> str:
        """Of the raw bytes read so far."""
        return self._sha256.hexdigest()

    def _read_text(self, raw: Iterator[bytes]) -> Iterator[bytes]:
        compression = self._file.compression
        if self._file.path is None:
            first = next(raw, b"")
            compression = tell_compression(first)
            raw = itertools.chain([first], raw)
        if compression is not None:
            return decompress(raw, compression)
        if self._file.path is None or self._piece.stop - self._piece.start == self._file.num_bytes:
            return raw
        return self._read_lines(raw)

    def _read_raw(self) -> Iterator[bytes]:
        self._seek(self._piece.start)
        left = self._piece.stop - self._piece.start
        while data := self._stream.read(min(left, _RAW_BYTES) if self._file.path else _RAW_BYTES):
            left -= len(data)
            self._sha256.update(data)
            self.num_bytes += len(data)
            yield data

    def _read_lines(self, raw: Iterator[bytes]) -> Iterator[bytes]:
        """The lines whose first byte lies in the piece."""
        begun = self._begins_line()
        last = b"\n"
        for data in raw:
            if not begun:
                newline = data.find(b"\n")
                begun = newline >= 0
                skipped = newline + 1 if begun else len(data)
                self.start += skipped
                data = data[skipped:]
            if data:
                last = data[-1:]
                yield data
        while last != b"\n" and (data := self._stream.read(_RAW_BYTES)):
            data = data[: data.find(b"\n") + 1] or data
            last = data[-1:]
            yield data

    def _begins_line(self) -> bool:
        """Whether the piece's first byte is the first of a line."""
        start = self._piece.start
        if not start:
            return True
        self._seek(start - 1)
        return self._stream.read(1) == b"\n"

    def _seek(self, start: int) -> None:
        if self._file.path is not None:
            self._stream.seek(start)

    def _check_size(self) -> None:
        if self._file.path is not None:
            self._file.check_size(os.fstat(self._stream.fileno()).st_size)


def open_input(file: InputFile) -> AbstractContextManager[BinaryIO]:
    """The file's bytes, or standard input, which stays open."""
    if file.path is None:
        return nullcontext(sys.stdin.buffer)
    return file.path.open("rb")
