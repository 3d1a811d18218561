"""Measures the lengths of a dataset's documents: quantiles, and a histogram in plain text.

Lengths are in tokens with the end-of-text token. A large dataset is read at evenly spaced records.
The documents that begin in them are followed to their ends, also in later records, so that long
documents are counted as often as short ones.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_eso.data.shards.reader import TokenDataset

MAX_RECORDS = 64

_QUANTILES = {
    "shortest": 0.0,
    "5%": 0.05,
    "25%": 0.25,
    "median": 0.5,
    "75%": 0.75,
    "95%": 0.95,
    "longest": 1.0,
}
_BAR_WIDTH = 50

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DocumentLengths:
    """Lengths of all documents of a dataset, or of some."""

    lengths: Int64
    """Lengths of the documents that begin in the records that were read, int64."""
    num_records: int
    """Number of records that were read."""

    @property
    def quantiles(self) -> dict[str, int]:
        """Lengths by the name of their quantile; each is the length of a document."""
        if not self.lengths.size:
            return {}
        shares = list(_QUANTILES.values())
        values = np.quantile(self.lengths, shares, method="inverted_cdf")
        return {name: int(value) for name, value in zip(_QUANTILES, values, strict=True)}

    @property
    def histogram(self) -> list[tuple[int, int, int]]:
        """Consecutive bins between powers of two: first length, last length, documents."""
        if not self.lengths.size:
            return []
        powers = np.frexp(self.lengths)[1] - 1  # floor(log2(length))
        counts = np.bincount(powers)
        return [
            (2**power, 2 ** (power + 1) - 1, int(counts[power]))
            for power in range(int(powers.min()), len(counts))
        ]

    def to_json(self) -> dict[str, Any]:
        """Return quantiles and histogram as plain values."""
        return {
            "records_read": self.num_records,
            "documents": len(self.lengths),
            "quantiles": self.quantiles,
            "histogram": [
                {"from": first, "to": last, "documents": count}
                for first, last, count in self.histogram
            ],
        }


def read_record(dataset: TokenDataset, record: int) -> Int64:
    """Read the tokens of a record, int64 [tokens], as a row of the record's length."""
    length = dataset.manifest.layout.record_num_tokens(record)
    row = record * (dataset.manifest.record_tokens // length)
    tokens: Int64 = dataset.rows(np.array([row]), length)[0]
    return tokens


def choose_records(num_records: int) -> Sequence[int]:
    """Choose at most MAX_RECORDS of the records 0 to num_records - 1, evenly spaced."""
    count = min(num_records, MAX_RECORDS)
    return [index * num_records // count for index in range(count)]


def measure_lengths(dataset: TokenDataset, records: Sequence[int]) -> DocumentLengths:
    """Measure the documents that begin in these records.

    Raises:
        DataError: A shard is damaged.
    """
    read = functools.lru_cache(maxsize=2)(functools.partial(read_record, dataset))
    eos = dataset.manifest.tokenizer.eos_token_id
    num_records = dataset.manifest.layout.num_records
    found: list[Int64] = []
    for record in records:
        begins_document = record == 0 or read(record - 1)[-1] == eos
        tokens = read(record)
        # A document that begins and ends in this record lies between two of these ends.
        ends = np.flatnonzero(tokens == eos)
        if begins_document:
            ends = np.insert(ends, 0, -1)
        found.append(np.diff(ends))
        # The last document may end in a later record.
        rest = len(tokens) - 1 - ends[-1] if ends.size else 0
        if rest:
            for following in range(record + 1, num_records):
                more = read(following)
                end = np.argmax(more == eos)
                if more[end] == eos:
                    rest += end + 1
                    break
                rest += len(more)
            found.append(np.array([rest]))
    return DocumentLengths(lengths=np.concatenate(found), num_records=len(records))


def draw_histogram(histogram: Sequence[tuple[int, int, int]]) -> Iterator[str]:
    """Yield a line for each bin; the longest bar has 50 characters."""
    largest = max((count for *_, count in histogram), default=0)
    total = sum(count for *_, count in histogram)
    for first, last, count in histogram:
        # Rounded up, so that each bin with a document has a bar.
        bar = "#" * -(-_BAR_WIDTH * count // largest)
        yield f"{first:>9} - {last:<9} {bar:<{_BAR_WIDTH}} {count:>9} {count / total:7.2%}"
