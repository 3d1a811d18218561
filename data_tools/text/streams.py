"""Files that are one stream of text, perhaps compressed: read as units, cut at separators.

The raw bytes are hashed on the way.
"""

import hashlib
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import BinaryIO

import xxhash

from data_tools.text.interface import InputFile, Slice, SourceRead, Unit
from data_tools.text.problems import Problem
from megatron_eso.compression import DamageError, decompress, find_compression
from megatron_eso.data.tokenizers.tokenizer import split_segments

_RAW_BYTES = 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class SliceText:
    """Reads a slice of a JSONL or text file.

    Attributes:
        start: byte of the file at which the text begins.
        num_bytes: raw bytes of the slice that were read so far.
        damage: after the last block, why the text ends there; None if it is whole.
        is_empty: after the last block, there is no text at all.
    """

    def __init__(self, file: InputFile, part: Slice, stream: BinaryIO) -> None:
        self._file = file
        self._slice = part
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self.start = part.start
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
        # Something is always held back, so that the last block is known as such.
        pending = bytearray()
        is_first = self._slice.start == 0
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
        """sha256 of the raw bytes read so far."""
        return self._sha256.hexdigest()

    def _read_text(self, raw: Iterator[bytes]) -> Iterator[bytes]:
        compression = self._file.compression
        if self._file.path is None:
            first = next(raw, b"")
            compression = find_compression(first)
            raw = itertools.chain([first], raw)
        if compression is not None:
            return decompress(raw, compression)
        if self._file.path is None or self._slice.num_bytes == self._file.num_bytes:
            return raw
        return self._read_lines(raw)

    def _read_raw(self) -> Iterator[bytes]:
        self._seek(self._slice.start)
        left = self._slice.num_bytes
        while data := self._stream.read(min(left, _RAW_BYTES) if self._file.path else _RAW_BYTES):
            left -= len(data)
            self._sha256.update(data)
            self.num_bytes += len(data)
            yield data

    def _read_lines(self, raw: Iterator[bytes]) -> Iterator[bytes]:
        """The lines whose first byte lies in the slice."""
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
        """Whether the slice's first byte is the first of a line."""
        start = self._slice.start
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


def read_stream(
    file: InputFile,
    part: Slice,
    index: int,
    *,
    separator: bytes,
    cuts_documents: bool = False,
    unit_bytes: int,
) -> Iterator[Unit]:
    """Read a slice of a stream of documents as units.

    Args:
        file: the file to read.
        part: the slice of the file.
        index: number of the slice in its span.
        separator: between documents; empty: there is one document.
        cuts_documents: whether a document may be cut after a newline and continue in the next unit.
        unit_bytes: size of a unit; it may be longer by a document that is not cut.

    Raises:
        DataError: the file is not the one that was planned with.
        OSError: it cannot be read.
    """
    document = xxhash.xxh3_128()
    continues = False
    line, done = 1, 0
    with open_input(file) as stream:
        text = SliceText(file, part, stream)
        for data, ends, is_last in _cut(text, separator, cuts_documents, unit_bytes):
            if not continues:
                document.reset()
            if continues or not ends:
                document.update(data.partition(separator)[0] if separator else data)
            next_line = line + data.count(b"\n")
            yield Unit(
                slice=index,
                path=file.label,
                kind=file.kind,
                data=data,
                first_line=line,
                start=text.start,
                continues=continues,
                ends_document=ends,
                document_hash=document.intdigest() if continues and ends else 0,
                problems=_find_problems(text, file.label, next_line) if is_last else (),
                raw_bytes=text.num_bytes - done,
                source=SourceRead(num_bytes=text.num_bytes, sha256=text.sha256())
                if is_last
                else None,
            )
            continues, line, done = not ends, next_line, text.num_bytes


def _find_problems(text: SliceText, path: str, line: int) -> tuple[Problem, ...]:
    if text.damage is not None:
        return (Problem(path=path, line=line, what=text.damage, start=text.start),)
    if text.is_empty:
        return (Problem(path=path, line=0, what="empty; leave it out"),)
    return ()


def _cut(
    text: SliceText, separator: bytes, cuts_documents: bool, unit_bytes: int
) -> Iterator[tuple[bytes, bool, bool]]:
    """Yield the data of units, whether they end with a document, and whether they are the last.

    Blocks of the text are cut after the last separator in them; where there is none, after the
    last segment, or else not at all.
    """
    pending = bytearray()
    searched = 0
    for block, is_last in text.read_blocks(unit_bytes):
        pending += block
        stop = len(pending)
        ends = True
        if not is_last or text.damage is not None:
            stop = _find_last_end(pending, separator, searched)
            ends = is_last or stop > 0
        # A very long line is searched once, not again for each block.
        if not ends and cuts_documents and b"\n" in block:
            stop = _find_segment_end(pending, separator)
        if stop or is_last:
            yield bytes(pending[:stop]), ends, is_last
            del pending[:stop]
        searched = max(0, len(pending) - len(separator) + 1)


def _find_last_end(pending: bytearray, separator: bytes, searched: int) -> int:
    """End of the last separator, as found from the left, or 0."""
    if not separator:
        return 0
    if len(separator) == 1:  # it cannot overlap itself: the last from the right is the same
        return pending.rfind(separator, searched) + 1
    _, *others = pending[searched:].split(separator)
    return len(pending) - len(others[-1]) if others else 0


def _find_segment_end(pending: bytearray, separator: bytes) -> int:
    """End of the last whole segment before what may be the beginning of a separator, or 0."""
    stop = len(pending) - max(0, len(separator) - 1)
    segments = list(split_segments(bytes(pending[:stop])))
    return stop - len(segments[-1]) if segments else 0
