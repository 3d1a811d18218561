"""Spans of the input cut into units of work of about 1 MiB of text.

The cuts depend on the bytes of the files alone: not on who asks, how often, or how many processes
work on the units. So a number of units says how far a span has come.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import xxhash

from data_tools.text.inputs import InputFile, Kind, Piece, Span, TextOptions
from data_tools.text.parquet_rows import ParquetRows
from data_tools.text.piece_text import PieceText, open_input
from data_tools.text.problems import Problem
from megatron_eso.data.tokenizers.tokenizer import split_segments
from megatron_eso.errors import DataError

UNIT_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRead:
    """What a piece was made of."""

    num_bytes: int
    sha256: str
    """Of the bytes of the piece, as they lie on the disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A piece of work: some lines of JSONL, some rows of Parquet, text files or parts of one."""

    piece: int
    """Index of the piece in the span."""
    path: str
    """For messages."""
    kind: Kind
    data: bytes
    number: int = 0
    """Of the unit in the span."""
    first_line: int = 1
    """Number of the first line of `data`, counted from 1 at the byte `start` of the file."""
    start: int = 0
    row_bytes: tuple[int, ...] = ()
    """Parquet: the lengths of the texts in `data`."""
    continues: bool = False
    """`data` begins inside a document of the unit before."""
    ends_document: bool = True
    """False where the last document goes on in the next unit."""
    document_hash: int = 0
    """Of the whole of a document that began in an earlier unit and ends in this one."""
    problems: tuple[Problem, ...] = ()
    """Met on reading."""
    raw_bytes: int = 0
    """Bytes of the input that were read for this unit."""
    digest: int = 0
    """Of the data of the units of the span up to this one."""
    source: SourceRead | None = None
    """In the last unit of a piece."""


def read_units(
    files: Sequence[InputFile],
    span: Span,
    options: TextOptions,
    *,
    skip_units: int = 0,
    skipped_digest: int | None = None,
    unit_bytes: int = UNIT_BYTES,
) -> Iterator[Unit]:
    """Read a span as units; every piece, even an empty one, ends with a unit that has its source.

    Args:
        files: of the input.
        span: to read.
        options: how documents lie in the files.
        skip_units: units to read over, which are not handed out.
        skipped_digest: of the last unit that is skipped, to see that the input is still the same.
        unit_bytes: size of a unit; it may be longer by a line, or by a document that is not cut.

    Raises:
        DataError: a file cannot be read, or is not what it was.
    """
    digest = xxhash.xxh3_64()
    number = 0
    for index, piece in enumerate(span.pieces):
        file = files[piece.file]
        try:
            for unit in _read_piece(file, piece, index, options, unit_bytes):
                digest.update(unit.data)
                number += 1
                if number > skip_units:
                    yield replace(unit, number=number - 1, digest=digest.intdigest())
                elif number == skip_units:
                    _check_skipped(file, digest.intdigest(), skipped_digest)
        except OSError as error:
            raise DataError(
                f"cannot read {_name(file)}: {error.strerror or error}; mend or leave it out"
            ) from error
    if number < skip_units:
        _check_skipped(files[span.pieces[-1].file], None, skipped_digest)


def _check_skipped(file: InputFile, digest: int | None, expected: int | None) -> None:
    if expected is not None and digest != expected:
        raise DataError(
            f"{_name(file)}, or a file read before it, is not what it was when the work was "
            "interrupted; restore it, or start again in another directory"
        )


def _read_piece(
    file: InputFile, piece: Piece, index: int, options: TextOptions, unit_bytes: int
) -> Iterator[Unit]:
    if file.kind == "parquet":
        return _read_parquet(file, index, options, unit_bytes)
    return _read_text(file, piece, index, options, unit_bytes)


def _read_parquet(
    file: InputFile, index: int, options: TextOptions, unit_bytes: int
) -> Iterator[Unit]:
    rows = ParquetRows(file, options.text_key)
    done = 0
    for batch in rows.read_batches(unit_bytes):
        read = int(rows.share_done * file.num_bytes)
        yield Unit(
            piece=index,
            path=_name(file),
            kind="parquet",
            data=batch.data,
            row_bytes=batch.row_bytes,
            problems=batch.problems,
            raw_bytes=read - done,
        )
        done = read
    yield Unit(
        piece=index,
        path=_name(file),
        kind="parquet",
        data=b"",
        raw_bytes=file.num_bytes - done,
        source=SourceRead(num_bytes=file.num_bytes, sha256=rows.sha256),
    )


def _read_text(
    file: InputFile, piece: Piece, index: int, options: TextOptions, unit_bytes: int
) -> Iterator[Unit]:
    separator = _separator(file, options)
    document = xxhash.xxh3_128()
    continues = False
    line, done = 1, 0
    with open_input(file) as stream:
        text = PieceText(file, piece, stream)
        cuts_documents = file.kind == "txt" and options.cuts_documents
        for data, ends, is_last in _cut(text, separator, cuts_documents, unit_bytes):
            if not continues:
                document.reset()
            if continues or not ends:
                document.update(data.partition(separator)[0] if separator else data)
            next_line = line + data.count(b"\n")
            yield Unit(
                piece=index,
                path=_name(file),
                kind=file.kind,
                data=data,
                first_line=line,
                start=text.start,
                continues=continues,
                ends_document=ends,
                document_hash=document.intdigest() if continues and ends else 0,
                problems=_find_problems(text, _name(file), next_line) if is_last else (),
                raw_bytes=text.num_bytes - done,
                source=SourceRead(num_bytes=text.num_bytes, sha256=text.sha256())
                if is_last
                else None,
            )
            continues, line, done = not ends, next_line, text.num_bytes


def _separator(file: InputFile, options: TextOptions) -> bytes:
    if file.kind == "jsonl":
        return b"\n"
    return (options.document_separator or "").encode("utf-8")


def _find_problems(text: PieceText, path: str, line: int) -> tuple[Problem, ...]:
    if text.damage is not None:
        return (Problem(path=path, line=line, what=text.damage, start=text.start),)
    if text.is_empty:
        return (Problem(path=path, line=0, what="empty; leave it out"),)
    return ()


def _cut(
    text: PieceText, separator: bytes, cuts_documents: bool, unit_bytes: int
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
        # A line without end is not searched again and again.
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


def _name(file: InputFile) -> str:
    return "standard input" if file.path is None else str(file.path)
