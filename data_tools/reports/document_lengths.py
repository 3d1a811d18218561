"""How long the documents of a dataset are: quantiles, and a histogram in plain text.

Lengths are in tokens, the end-of-text token included. Of a large dataset some records are read,
evenly spaced, and the documents that begin in them counted to their ends, wherever these are: so
long documents are as likely to be counted as short ones.
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
    """The lengths of a dataset's documents, or of a part of them."""

    lengths: Int64
    """Lengths of the documents that begin in the records that were read."""
    num_records: int
    """Records that were read."""

    @property
    def quantiles(self) -> dict[str, int]:
        """Lengths by the name of their quantile; each is the length of some document."""
        if not self.lengths.size:
            return {}
        shares = list(_QUANTILES.values())
        values = np.quantile(self.lengths, shares, method="inverted_cdf")
        return {name: int(value) for name, value in zip(_QUANTILES, values, strict=True)}

    @property
    def histogram(self) -> list[tuple[int, int, int]]:
        """Bins between powers of two, none left out in between: first, last length, documents."""
        if not self.lengths.size:
            return []
        powers = np.frexp(self.lengths)[1] - 1  # of the largest power of two that is no larger
        counts = np.bincount(powers)
        return [
            (2**power, 2 ** (power + 1) - 1, int(counts[power]))
            for power in range(int(powers.min()), len(counts))
        ]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
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
    """The tokens of a record, int64 [tokens]: it is a row of its own length."""
    length = dataset.manifest.layout.record_num_tokens(record)
    row = record * (dataset.manifest.record_tokens // length)
    tokens: Int64 = dataset.rows(np.array([row]), length)[0]
    return tokens


def choose_records(num_records: int) -> Sequence[int]:
    """No more than MAX_RECORDS of the records 0 to num_records - 1, evenly spaced."""
    count = min(num_records, MAX_RECORDS)
    return [place * num_records // count for place in range(count)]


def measure_lengths(dataset: TokenDataset, records: Sequence[int]) -> DocumentLengths:
    """The lengths of the documents that begin in these records.

    Raises:
        DataError: a shard is damaged.
    """
    read = functools.lru_cache(maxsize=2)(functools.partial(read_record, dataset))
    eos = dataset.manifest.tokenizer.eos_token_id
    num_records = dataset.manifest.layout.num_records
    found: list[Int64] = []
    for record in records:
        begins_document = record == 0 or read(record - 1)[-1] == eos
        tokens = read(record)
        # Where documents end; those that begin here lie between two of these places.
        ends = np.flatnonzero(tokens == eos)
        if begins_document:
            ends = np.insert(ends, 0, -1)
        found.append(np.diff(ends))
        rest = len(tokens) - 1 - ends[-1] if ends.size else 0
        if rest:
            for following in range(record + 1, num_records):
                more = read(following)
                place = np.argmax(more == eos)
                if more[place] == eos:
                    rest += place + 1
                    break
                rest += len(more)
            found.append(np.array([rest]))
    return DocumentLengths(lengths=np.concatenate(found), num_records=len(records))


def draw_histogram(histogram: Sequence[tuple[int, int, int]]) -> Iterator[str]:
    """A line for each bin, the longest bar being 50 characters long."""
    largest = max((count for *_, count in histogram), default=0)
    total = sum(count for *_, count in histogram)
    for first, last, count in histogram:
        # A bin that is not empty shows.
        bar = "#" * -(-_BAR_WIDTH * count // largest)
        yield f"{first:>9} - {last:<9} {bar:<{_BAR_WIDTH}} {count:>9} {count / total:7.2%}"
