"""Locates a data row: its shard, record and bytes, and the documents in it."""

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_tools.builds.document_order import find_in_input
from data_tools.reports.document_lengths import read_record
from megatron_eso.data.shards.format import record_name
from megatron_eso.data.shards.manifest import Manifest
from megatron_eso.data.shards.reader import TokenDataset


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentPart:
    """The part of a row that belongs to one document."""

    document: int
    """Number of the document in the dataset."""
    start: int
    """Number of the part's first token in the row."""
    stop: int
    source: str | None
    """File of the text, and which of its documents; None if unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLocation:
    """Location of a data row on the disk, and its documents."""

    shard: str
    record: int
    member: str
    """Name of the record in the shard's archive."""
    offset: int
    """Offset of the first token in the shard's file, in bytes."""
    first_token: int
    """Number of the row's first token in the record."""
    num_tokens: int
    documents: tuple[DocumentPart, ...]

    def describe(self) -> Iterator[str]:
        """Yield the location as lines of text."""
        last = self.first_token + self.num_tokens - 1
        yield f"shard          {self.shard}, offset {self.offset}"
        yield f"record         {self.record} ({self.member}), tokens {self.first_token} to {last}"
        for part in self.documents:
            source = f": {part.source}" if part.source else ""
            yield (
                f"document       {part.document} in tokens {part.start} to {part.stop - 1} "
                f"of the row{source}"
            )


def locate_row(dataset: TokenDataset, row: int, length: int) -> RowLocation:
    """Find a row of `length` tokens, and read its record.

    Raises:
        DataError: The record is damaged.
    """
    # The documents in the row, by the ends of documents in its record.
    layout, manifest = dataset.manifest.layout, dataset.manifest
    (record,), (first,) = (found.tolist() for found in layout.locate_rows(np.array([row]), length))
    is_end = read_record(dataset, record) == manifest.tokenizer.eos_token_id
    path = dataset.directory / manifest.documents.name
    begins = int(np.fromfile(path, dtype="<u8", count=1, offset=8 * record)[0])
    document = begins + int(np.count_nonzero(is_end[:first]))
    ends = (np.flatnonzero(is_end[first : first + length]) + 1).tolist()
    edges = [0, *(end for end in ends if end < length), length]
    # The row on the disk.
    return RowLocation(
        shard=manifest.shards[record // layout.shard_records].name,
        record=record,
        member=record_name(record, layout.dtype),
        offset=layout.record_offset(record) + first * layout.itemsize,
        first_token=first,
        num_tokens=length,
        documents=tuple(
            DocumentPart(
                document=number,
                start=start,
                stop=stop,
                source=_name_source(manifest, number),
            )
            for number, (start, stop) in enumerate(itertools.pairwise(edges), document)
        ),
    )


def _name_source(manifest: Manifest, document: int) -> str | None:
    """Describe the source of a document: the file, and its number among those kept of the file."""
    if manifest.shuffle_seed is not None:
        document = find_in_input(document, manifest.num_documents, manifest.shuffle_seed)
    stops = list(itertools.accumulate(source.num_documents for source in manifest.sources))
    index = bisect.bisect_right(stops, document)
    if index == len(stops):
        return None
    source = manifest.sources[index]
    number = document - (stops[index] - source.num_documents)
    part = f", bytes from {source.offset}" if source.offset else ""
    return f"document {number} of {source.num_documents} kept of {source.path}{part}"
