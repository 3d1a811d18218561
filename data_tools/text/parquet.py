"""`.parquet`: one document per row, in the column of the text key.

Only that column is read, in batches of rows, never a whole row group at once.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.text.interface import (
    Document,
    InputFile,
    Slice,
    SourceRead,
    TextFormat,
    TextOptions,
    Unit,
    hash_document,
)
from data_tools.text.problems import Problem, find_invalid_utf8

_READ_BYTES = 2**20
_MAX_ROWS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBatch:
    """The texts of consecutive rows, and the problems of the rows without a text."""

    data: bytes = b""
    row_bytes: tuple[int, ...] = ()
    """Lengths of the texts in `data`."""
    problems: tuple[Problem, ...] = ()


class ParquetRows:
    """A reader of the text column of a Parquet file.

    Attributes:
        sha256: Hash of the file.
        share_done: Share of the rows that have been read.
    """

    def __init__(self, file: InputFile, text_key: str) -> None:
        """Hash the file.

        Raises:
            DataError: The file has changed its size.
            OSError: The file cannot be read.
        """
        assert file.path is not None
        self._path = file.path
        self._text_key = text_key
        self.sha256 = _hash_file(file)
        self.share_done = 0.0

    def read_batches(self, batch_bytes: int) -> Iterator[RowBatch]:
        """Yield batches of about `batch_bytes`, or of one larger row.

        Raises:
            OSError: The file cannot be read.
        """
        try:
            # Without these settings the whole column of a row group is in memory.
            file = pq.ParquetFile(
                self._path,
                pre_buffer=False,
                buffer_size=_READ_BYTES,
                page_checksum_verification=True,
            )
        except (pa.ArrowException, OSError) as error:
            yield self._report(0, _describe_damage(error))
            return
        with file:
            wrong = self._find_wrong(file)
            if wrong is not None:
                yield self._report(0, wrong)
                return
            first_row = 1
            for group in range(file.num_row_groups):
                for batch, row in self._read_group(file, group, first_row, batch_bytes):
                    self.share_done = (row - 1) / file.metadata.num_rows
                    yield batch
                first_row += file.metadata.row_group(group).num_rows

    def _read_group(
        self, file: pq.ParquetFile, group: int, first_row: int, batch_bytes: int
    ) -> Iterator[tuple[RowBatch, int]]:
        """Yield the batches of a row group, each with the number of the row after it."""
        row = first_row
        end = first_row + file.metadata.row_group(group).num_rows
        batches = file.iter_batches(
            batch_size=self._choose_rows(file, group, batch_bytes),
            row_groups=[group],
            columns=[self._text_key],
            use_threads=False,
        )
        try:
            for batch in batches:
                for texts in _cut(batch.column(0), batch_bytes):
                    taken = self._take(texts, row)
                    row += len(texts)
                    yield taken, row
        except (pa.ArrowException, OSError) as error:
            damage = f"rows {row} to {end - 1} cannot be read: {_describe_damage(error)}"
            yield self._report(row, damage), end

    def _choose_rows(self, file: pq.ParquetFile, group: int, batch_bytes: int) -> int:
        """Return how many rows of average size have about `batch_bytes`."""
        metadata = file.metadata.row_group(group)
        columns = (metadata.column(number) for number in range(metadata.num_columns))
        size = sum(
            column.total_uncompressed_size
            for column in columns
            if column.path_in_schema == self._text_key
        )
        num_rows: int = batch_bytes * metadata.num_rows // max(1, size)
        return max(1, min(_MAX_ROWS, num_rows))

    def _take(self, texts: pa.Array, first_row: int) -> RowBatch:
        bad = {
            int(index): f"{self._text_key!r} is null; correct the row"
            for index in np.flatnonzero(texts.is_null().to_numpy(zero_copy_only=False))
        }
        rows = texts.to_pylist()
        try:
            texts.view(pa.large_string()).validate(full=True)
        except pa.ArrowInvalid:
            bad |= {
                index: "invalid UTF-8; convert the text"
                for index, row in enumerate(rows)
                if row is not None and find_invalid_utf8(row) is not None
            }
        good = [row for index, row in enumerate(rows) if index not in bad]
        return RowBatch(
            data=b"".join(good),
            row_bytes=tuple(map(len, good)),
            problems=tuple(
                self._name_problem(first_row + index, what) for index, what in sorted(bad.items())
            ),
        )

    def _find_wrong(self, file: pq.ParquetFile) -> str | None:
        """Describe why the file has no text to read; None if it has."""
        schema = file.schema_arrow
        if not file.metadata.num_rows:
            return "is empty; leave it out"
        if self._text_key not in schema.names:
            names = ", ".join(schema.names)
            return f"no column {self._text_key!r}; name one of {names} by --text-key"
        kind = schema.field(self._text_key).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (
            pa.types.is_string(kind)
            or pa.types.is_large_string(kind)
            or pa.types.is_binary(kind)
            or pa.types.is_large_binary(kind)
        ):
            return f"column {self._text_key!r} is {kind}, no text; name another by --text-key"
        return None

    def _report(self, row: int, what: str) -> RowBatch:
        return RowBatch(problems=(self._name_problem(row, what),))

    def _name_problem(self, row: int, what: str) -> Problem:
        return Problem(path=str(self._path), line=row, what=what, is_row=True)


def _cut(texts: pa.Array, batch_bytes: int) -> Iterator[pa.Array]:
    """Yield slices of about `batch_bytes`, or of one larger text, as large binaries."""
    texts = texts.cast(pa.large_string()) if pa.types.is_dictionary(texts.type) else texts
    texts = texts.cast(pa.large_binary())
    lengths = pc.binary_length(texts).fill_null(0).to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths)
    start = 0
    while start < len(texts):
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + batch_bytes, side="right"))
        stop = max(start + 1, stop)
        yield texts.slice(start, stop - start)
        start = stop


def _describe_damage(error: Exception) -> str:
    """Describe the damage of a file.

    Raises:
        OSError: The disk fails, so the file may be intact.
    """
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return f"damaged Parquet ({error}); copy the file again"


def _hash_file(file: InputFile) -> str:
    assert file.path is not None
    digest = hashlib.sha256()
    num_bytes = 0
    with file.path.open("rb") as stream:
        while data := stream.read(_READ_BYTES):
            digest.update(data)
            num_bytes += len(data)
    file.check_size(num_bytes)
    return digest.hexdigest()


def _read(
    file: InputFile, part: Slice, index: int, options: TextOptions, unit_bytes: int
) -> Iterator[Unit]:
    rows = ParquetRows(file, options.text_key)
    done = 0
    for batch in rows.read_batches(unit_bytes):
        read = int(rows.share_done * file.num_bytes)
        yield Unit(
            slice=index,
            path=file.label,
            kind=file.kind,
            data=batch.data,
            row_bytes=batch.row_bytes,
            problems=batch.problems,
            raw_bytes=read - done,
        )
        done = read
    yield Unit(
        slice=index,
        path=file.label,
        kind=file.kind,
        data=b"",
        raw_bytes=file.num_bytes - done,
        source=SourceRead(num_bytes=file.num_bytes, sha256=rows.sha256),
    )


def _parse(unit: Unit, options: TextOptions) -> Iterator[Document | Problem]:
    stop = 0
    for num_bytes in unit.row_bytes:
        start, stop = stop, stop + num_bytes
        text = unit.data[start:stop]
        yield Document(text=text, hash=hash_document(text))
    yield from unit.problems


PARQUET = TextFormat(
    name="parquet",
    suffixes=(".parquet",),
    is_compressible=False,
    is_sliceable=False,
    read=_read,
    parse=_parse,
)
