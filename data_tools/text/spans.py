"""Divides the input into spans, which are encoded one by one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_tools.text.formats import FORMATS
from data_tools.text.interface import InputFile, Slice

SPAN_BYTES = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Slices of the input that one worker encodes as a unit, in order."""

    number: int
    slices: tuple[Slice, ...]

    @property
    def num_bytes(self) -> int:
        """Size of all slices on the disk."""
        return sum(each.num_bytes for each in self.slices)


def plan_spans(files: Sequence[InputFile], span_bytes: int = SPAN_BYTES) -> list[Span]:
    """Cut the input into spans of about `span_bytes`, by the sizes of the files alone.

    A larger file is cut if its format allows slices; small files share a span.
    """
    spans: list[Span] = []
    pending: list[Slice] = []
    size = 0
    for each in _cut_files(files, span_bytes):
        if pending and size + each.num_bytes > span_bytes:
            spans.append(Span(number=len(spans), slices=tuple(pending)))
            pending, size = [], 0
        pending.append(each)
        size += each.num_bytes
    if pending:
        spans.append(Span(number=len(spans), slices=tuple(pending)))
    return spans


def _cut_files(files: Sequence[InputFile], span_bytes: int) -> Iterator[Slice]:
    for number, file in enumerate(files):
        is_sliceable = FORMATS[file.kind].is_sliceable and file.compression is None
        is_cut = is_sliceable and file.num_bytes > span_bytes
        step = span_bytes if is_cut else max(1, file.num_bytes)
        for start in range(0, max(1, file.num_bytes), step):
            yield Slice(file=number, start=start, stop=min(start + step, file.num_bytes))
