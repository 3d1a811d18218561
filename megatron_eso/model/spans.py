"""The keys that rows read: causal streams and strict queries, from the rows of a micro-batch.

The *strict query* i of m over the n keys of its stream reads the keys `[0, n - m + 1 + i)` and
itself. This is causal attention with bottom-right alignment, with the query's own key and value
added. An attention backend computes it.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from megatron_eso.objectives.rows import Rows


class QuerySpan(NamedTuple):
    """The strict queries of one stream, and the keys that the last query reads."""

    num_queries: int
    first_key: int
    num_keys: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BodySpans:
    """The streams and query spans of a layer that keeps all rows, in the order of the rows.

    Attributes:
        mixed_lengths: Lengths of the mixed streams; each attends causally.
        clean_lengths: Lengths of the clean streams; each attends causally.
        queries: Query spans over the clean streams, whose keys are numbered from 0 on.
    """

    mixed_lengths: tuple[int, ...]
    clean_lengths: tuple[int, ...]
    queries: tuple[QuerySpan, ...]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The numbers of rows of the mixed streams, of the clean streams, and of the queries."""
        num_queries = sum(span.num_queries for span in self.queries)
        return sum(self.mixed_lengths), sum(self.clean_lengths), num_queries


def find_body_spans(rows: Rows) -> BodySpans:
    """Return the streams and query spans of all layers except the last."""
    clean_lengths = rows.stream_lengths[rows.num_mixed_streams :]
    return BodySpans(
        mixed_lengths=rows.stream_lengths[: rows.num_mixed_streams],
        clean_lengths=clean_lengths,
        queries=tuple(
            QuerySpan(count, end - length, length)
            for count, length, end in zip(
                rows.query_lengths, clean_lengths, accumulate(clean_lengths), strict=True
            )
        ),
    )


def find_loss_spans(rows: Rows) -> tuple[QuerySpan, ...]:
    """Return the query spans of the last layer: loss rows over the first n - 1 rows of a stream.

    n is the number of tokens of the sample. Keys have the numbers of the rows.
    """
    # Mixed streams have a row for the last slot, which no row reads; clean streams have none.
    num_clean_streams = len(rows.stream_lengths) - rows.num_mixed_streams
    unread = (1,) * rows.num_mixed_streams + (0,) * num_clean_streams
    ends = accumulate(rows.stream_lengths)
    return tuple(
        QuerySpan(count, end - length, length - less)
        for count, length, less, end in zip(
            rows.loss_lengths, rows.stream_lengths, unread, ends, strict=True
        )
    )
