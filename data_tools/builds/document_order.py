"""Chooses the documents of a split and their order, as addresses in the encoded spans.

The address of a document is `span << 40 | number of its first token in the span`. The documents are
read in groups, so that memory does not grow with their number; each group is found by its number.

In the order of the input, a group is consecutive documents of a span without those that are left
out. In random order, group g holds the documents that the keyed permutation gives for the numbers
from g * GROUP_DOCUMENTS on; their addresses come from a file of 16 bytes per document.

Shapes: D documents of a group, G groups.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.builds.deduplication import GROUP_DOCUMENTS, CountedSpan, read_marks
from data_tools.builds.journal import read_documents
from megatron_eso.data.shards.manifest import Split
from megatron_eso.randomness.permutation import permute, round_keys
from megatron_eso.randomness.purposes import Purpose

SPAN_SHIFT = 40

_ADDRESS_DTYPE = np.dtype([("address", "<u8"), ("num_tokens", "<u8")])


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Condition for the documents of a split."""

    split: Split
    validation_share: float
    marks: Path | None
    """File with the marks of the duplicates, which are left out; None keeps duplicates."""

    def choose(self, documents: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
        """Return which documents belong to this split by the hash of their text, bool [D].

        Duplicates are included.
        """
        threshold = np.uint64(int(self.validation_share * 2**64))
        if self.split == "validation":
            return np.asarray(documents["hash_low"] < threshold)
        return np.asarray(documents["hash_low"] >= threshold)


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitCounts:
    """Sizes of a split."""

    num_documents: int
    num_text_bytes: int
    num_duplicates: int
    slice_documents: tuple[npt.NDArray[np.int64], ...]
    """Number of documents in each slice of each span."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentOrder(ABC):
    """The documents of a split in their order, in groups."""

    group_ends_G: npt.NDArray[np.int64]
    """Number of tokens up to the end of each group."""

    @abstractmethod
    def read_group(self, group: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return addresses and token counts of a group's documents, int64 [D] each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputOrder(DocumentOrder):
    """The documents in the order of the input."""

    spans: Sequence[CountedSpan]
    selection: Selection
    span_G: npt.NDArray[np.int64]
    first_document_G: npt.NDArray[np.int64]
    first_token_G: npt.NDArray[np.int64]
    """Number of the group's first token in the span."""

    def read_group(self, group: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return addresses and token counts of a group's documents."""
        number = int(self.span_G[group])
        first = int(self.first_document_G[group])
        span = self.spans[number]
        documents = read_documents(
            span.files, first, min(GROUP_DOCUMENTS, span.num_documents - first)
        )
        kept_D = self.selection.choose(documents)
        if self.selection.marks is not None:
            marks = read_marks(self.selection.marks, self.spans)[number]
            kept_D &= marks[first : first + len(documents)] == 0
        num_tokens = documents["num_tokens"].astype(np.int64)
        starts = np.cumsum(num_tokens) - num_tokens
        start = (number << SPAN_SHIFT) + int(self.first_token_G[group])
        return start + starts[kept_D], num_tokens[kept_D]


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomOrder(DocumentOrder):
    """The documents in a random order, a function of the key and the number of documents."""

    addresses: Path
    num_documents: int
    keys: npt.NDArray[np.uint64]

    def read_group(self, group: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return addresses and token counts of a group's documents."""
        return _read_shuffled(self.addresses, self.num_documents, self.keys, group)


def survey(
    spans: Sequence[CountedSpan],
    slices: Sequence[npt.NDArray[np.int64]],
    selection: Selection,
) -> tuple[InputOrder, SplitCounts]:
    """Read all documents once, and find those of a split.

    Args:
        spans: The spans with all documents.
        slices: For each span, the number of documents in each of its slices, int64.
        selection: The condition for the documents of the split.

    Returns:
        The split's documents in the order of the input, and its sizes.
    """
    counter = _Counter()
    marks = None if selection.marks is None else read_marks(selection.marks, spans)
    for number, (span, of_slices) in enumerate(zip(spans, slices, strict=True)):
        counter.begin_span(of_slices)
        for first, documents in span.iterate_groups():
            chosen_D = selection.choose(documents)
            kept_D = chosen_D
            if marks is not None:
                kept_D = chosen_D & (marks[number][first : first + len(documents)] == 0)
            counter.add(number, first, documents, chosen_D, kept_D)
    table = np.array(counter.groups, dtype=np.int64).reshape(-1, 4)
    order = InputOrder(
        spans=spans,
        selection=selection,
        span_G=table[:, 0],
        first_document_G=table[:, 1],
        first_token_G=table[:, 2],
        group_ends_G=np.cumsum(table[:, 3]),
    )
    return order, counter.counts()


def shuffle(order: InputOrder, counts: SplitCounts, seed: int, addresses: Path) -> RandomOrder:
    """Put the documents of a split into a random order.

    Args:
        order: The documents in the order of the input.
        counts: The sizes of the split.
        seed: Key of the random order, in [0, 2^64).
        addresses: The file to write, 16 bytes per document.
    """
    with addresses.open("wb") as file:
        for group in range(len(order.group_ends_G)):
            address_D, num_tokens_D = order.read_group(group)
            table = np.empty(len(address_D), dtype=_ADDRESS_DTYPE)
            table["address"], table["num_tokens"] = address_D, num_tokens_D
            file.write(table.data)
    keys = _shuffle_keys(seed)
    num_tokens = [
        int(_read_shuffled(addresses, counts.num_documents, keys, group)[1].sum())
        for group in range(-(-counts.num_documents // GROUP_DOCUMENTS))
    ]
    return RandomOrder(
        addresses=addresses,
        num_documents=counts.num_documents,
        keys=keys,
        group_ends_G=np.cumsum(num_tokens, dtype=np.int64),
    )


def find_in_input(document: int, num_documents: int, seed: int) -> int:
    """Return the number in the input of a document of a shuffled split."""
    number = np.array([document], dtype=np.uint64)
    return int(permute(number, num_documents, _shuffle_keys(seed))[0])


def _shuffle_keys(seed: int) -> npt.NDArray[np.uint64]:
    return round_keys(seed, Purpose.DOCUMENTS, 0)


class _Counter:
    """Counts the documents, tokens and bytes of a split, group by group."""

    def __init__(self) -> None:
        self.groups: list[tuple[int, int, int, int]] = []
        self._num_documents = 0
        self._num_text_bytes = 0
        self._num_duplicates = 0
        self._slices: list[npt.NDArray[np.int64]] = []

    def begin_span(self, of_slices: npt.NDArray[np.int64]) -> None:
        self._first_token = 0
        self._slice_ends = np.cumsum(of_slices)
        self._slices.append(np.zeros_like(of_slices))

    def add(
        self,
        span: int,
        first: int,
        documents: npt.NDArray[np.void],
        chosen_D: npt.NDArray[np.bool_],
        kept_D: npt.NDArray[np.bool_],
    ) -> None:
        num_tokens = int(documents["num_tokens"][kept_D].sum())
        self.groups.append((span, first, self._first_token, num_tokens))
        self._first_token += int(documents["num_tokens"].sum())
        self._num_documents += int(kept_D.sum())
        self._num_text_bytes += int(documents["num_text_bytes"][kept_D].sum())
        self._num_duplicates += int(chosen_D.sum() - kept_D.sum())
        kept = np.flatnonzero(kept_D) + first
        if kept.size:
            part = np.searchsorted(self._slice_ends, kept, side="right")
            counts = np.bincount(part - part[0])
            self._slices[-1][part[0] : part[-1] + 1] += counts

    def counts(self) -> SplitCounts:
        return SplitCounts(
            num_documents=self._num_documents,
            num_text_bytes=self._num_text_bytes,
            num_duplicates=self._num_duplicates,
            slice_documents=tuple(self._slices),
        )


def _read_shuffled(
    addresses: Path, num_documents: int, keys: npt.NDArray[np.uint64], group: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    first = group * GROUP_DOCUMENTS
    last = min(first + GROUP_DOCUMENTS, num_documents)
    chosen = permute(np.arange(first, last, dtype=np.uint64), num_documents, keys)
    table = np.memmap(addresses, dtype=_ADDRESS_DTYPE, mode="r")[chosen]
    return table["address"].astype(np.int64), table["num_tokens"].astype(np.int64)
