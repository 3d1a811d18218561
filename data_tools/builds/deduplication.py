"""Marks the documents whose text equals an earlier one, by the 128-bit hash of the text.

The hashes are split into buckets by their lowest bits. A pass over all documents takes the hashes
of one bucket, sorts them with the numbers of their documents, and marks all but the first of each.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.builds.journal import SpanFiles, read_documents
from data_tools.builds.workers import map_in_order
from megatron_eso.files import new_path

BUCKET_DOCUMENTS = 2**24
"""Documents that a pass holds in memory, about 50 bytes each."""
GROUP_DOCUMENTS = 2**16
"""Documents that are read in one group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CountedSpan:
    """An encoded span, with the number of its documents."""

    files: SpanFiles
    num_documents: int

    def iterate_groups(self) -> Iterator[tuple[int, npt.NDArray[np.void]]]:
        """Yield the documents in groups (DOCUMENT_DTYPE), each with the number of its first one."""
        for first in range(0, self.num_documents, GROUP_DOCUMENTS):
            count = min(GROUP_DOCUMENTS, self.num_documents - first)
            yield first, read_documents(self.files, first, count)


def mark_duplicates(
    spans: Sequence[CountedSpan],
    path: Path,
    num_workers: int,
    bucket_documents: int = BUCKET_DOCUMENTS,
) -> None:
    """Write one byte per document in the order of the input: 1 for a duplicate, else 0.

    Args:
        spans: The spans with all documents.
        path: The file to write; an existing file is kept.
        num_workers: Number of processes; each takes one bucket at a time.
        bucket_documents: Approximate number of documents in a bucket.
    """
    if path.exists():
        return
    num_documents = sum(span.num_documents for span in spans)
    # A power of two, so that the lowest bits are the number of the bucket.
    num_buckets = 1 << max(0, -(-num_documents // bucket_documents) - 1).bit_length()
    finder = _DuplicateFinder(spans=spans, num_buckets=num_buckets)
    workers = min(num_workers, num_buckets)
    with new_path(path) as unfinished:
        marks = np.memmap(unfinished, dtype=np.uint8, mode="w+", shape=(num_documents,))
        for _, duplicates in map_in_order(finder, range(num_buckets), workers):
            marks[duplicates] = 1
        marks.flush()


@dataclass(frozen=True, kw_only=True, slots=True)
class _DuplicateFinder:
    spans: Sequence[CountedSpan]
    num_buckets: int

    def __call__(self, bucket: int) -> npt.NDArray[np.int64]:
        """Return a bucket's duplicates by their numbers in the input, int64, unsorted."""
        mask = np.uint64(self.num_buckets - 1)
        lows, highs, numbers = [], [], []
        base = 0
        for span in self.spans:
            for first, documents in span.iterate_groups():
                chosen = np.flatnonzero(documents["hash_low"] & mask == bucket)
                lows.append(documents["hash_low"][chosen])
                highs.append(documents["hash_high"][chosen])
                numbers.append(chosen + (base + first))
            base += span.num_documents
        low, high, number = (np.concatenate(parts) for parts in (lows, highs, numbers))
        # The sort is stable: equal hashes keep the order of the input.
        order = np.lexsort((high, low))
        low, high = low[order], high[order]
        is_repeated = np.flatnonzero((low[1:] == low[:-1]) & (high[1:] == high[:-1])) + 1
        return np.asarray(number[order[is_repeated]], dtype=np.int64)


def read_marks(path: Path, spans: Sequence[CountedSpan]) -> list[npt.NDArray[np.uint8]]:
    """Return the marks of each span's documents, uint8 [documents], mapped from the file."""
    marks = np.memmap(path, dtype=np.uint8, mode="r")
    ends = itertools.accumulate(span.num_documents for span in spans)
    return [marks[end - span.num_documents : end] for span, end in zip(spans, ends, strict=True)]
