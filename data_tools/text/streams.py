"""Reads a stream of text, perhaps compressed, as units cut at separators; hashes the raw bytes."""

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
    """A reader of a slice of a JSONL or text file.

    Attributes:
        start: Byte of the file at which the text begins.
        num_bytes: Raw bytes of the slice that were read so far.
        damage: After the last block: why the text ends early; None if it is whole.
        is_empty: After the last block: whether there was no text at all.
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
        """Yield blocks of this size, each with whether it is the last, which may be smaller.

        Raises:
            DataError: The file has changed its size.
            OSError: The file cannot be read.
        """
        self._check_size()
        raw = self._read_raw()
        # Some text is always held back, so that the last block is known as such.
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
        """Return the sha256 of the raw bytes read so far."""
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
        """Yield the lines whose first byte is in the slice."""
        # The end of a line that began before the slice is left out.
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
        # The last line is read to its end, which may be after the slice.
        while last != b"\n" and (data := self._stream.read(_RAW_BYTES)):
            data = data[: data.find(b"\n") + 1] or data
            last = data[-1:]
            yield data

    def _begins_line(self) -> bool:
        """Return whether the slice's first byte is the first of a line."""
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
    """Open a file, or return standard input, which stays open."""
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
        file: The file to read.
        part: The slice of the file.
        index: Number of the slice in its span.
        separator: Bytes between documents; empty: the file is one document.
        cuts_documents: Whether a document may be cut after a newline and continue in the next unit.
        unit_bytes: Size of a unit; a document that is not cut may make it longer.

    Raises:
        DataError: The file has changed its size.
        OSError: The file cannot be read.
    """
    document = xxhash.xxh3_128()
    continues = False
    line, done = 1, 0
    with open_input(file) as stream:
        text = SliceText(file, part, stream)
        for data, ends, is_last in _cut(text, separator, cuts_documents, unit_bytes):
            # The hash of a document that lies in several units.
            if not continues:
                document.reset()
            if continues or not ends:
                document.update(data.partition(separator)[0] if separator else data)
            # The unit, with the lines and bytes up to its end.
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
        return (Problem(path=path, line=0, what="is empty; leave it out"),)
    return ()


def _cut(
    text: SliceText, separator: bytes, cuts_documents: bool, unit_bytes: int
) -> Iterator[tuple[bytes, bool, bool]]:
    """Yield the data of each unit, whether it ends with a document, and whether it is the last.

    Blocks of the text are cut after their last separator, or else after their last segment; a block
    without both is not cut.
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
        # A block without a newline has no end of a segment, so a very long line is searched once.
        if not ends and cuts_documents and b"\n" in block:
            stop = _find_segment_end(pending, separator)
        if stop or is_last:
            yield bytes(pending[:stop]), ends, is_last
            del pending[:stop]
        searched = max(0, len(pending) - len(separator) + 1)


def _find_last_end(pending: bytearray, separator: bytes, searched: int) -> int:
    """Return the end of the last separator, counted from the left, or 0."""
    if not separator:
        return 0
    if len(separator) == 1:  # it cannot overlap itself, so the search from the right agrees
        return pending.rfind(separator, searched) + 1
    _, *others = pending[searched:].split(separator)
    return len(pending) - len(others[-1]) if others else 0


def _find_segment_end(pending: bytearray, separator: bytes) -> int:
    """Return the end of the last segment before a possible beginning of a separator, or 0."""
    stop = len(pending) - max(0, len(separator) - 1)
    segments = list(split_segments(bytes(pending[:stop])))
    return stop - len(segments[-1]) if segments else 0
