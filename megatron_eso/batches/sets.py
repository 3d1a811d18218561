"""Sets of tokens that are predicted at once, each from the sets before it."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from megatron_eso.batches.rows import MicroBatch, Reading, Span


def predict_in_sets(micro_batch: MicroBatch, set_size: int) -> MicroBatch:
    """Return a plan of exact likelihoods with fewer keys: queries do not read their own set.

    The tokens of a set are predicted independently of each other, as in parallel generation. The
    sum of a sample's losses is then a bound of its negative log-likelihood in this order; with sets
    of one token it is exact.

    Args:
        micro_batch: Clean streams, and a query for each token that reads the clean stream before
            its slot and itself.
        set_size: Consecutive slots of a set; the last set of a stream may be smaller.
    """
    rows = micro_batch.rows
    # A query reads as many clean tokens as its slot's number; now only those of earlier sets.
    queries_E = rows.loss_rows_E[: rows.num_loss_rows]
    reads_4R = rows.reads_4R.clone()
    reads_4R[1, queries_E] -= reads_4R[1, queries_E] % set_size
    # Queries with equal keys are blocks of one row, which the attention joins to tiles.
    spans = tuple(_split_queries(rows.spans, set_size))
    changed = replace(
        rows,
        reads_4R=reads_4R,
        spans=spans,
        loss_spans=tuple(span for span in spans if span.reading is Reading.BLOCK),
    )
    return replace(micro_batch, rows=changed, block=None)


def _split_queries(spans: Iterable[Span], set_size: int) -> Iterator[Span]:
    """Yield the spans of all rows, with one span for each query."""
    row = 0
    for span in spans:
        if span.reading is Reading.STRICT:
            first = span.num_keys - span.num_rows + 1
            for number in range(span.num_rows):
                num_keys = (first + number) // set_size * set_size
                yield Span(Reading.BLOCK, 1, span.first_key, num_keys, row + number, 1)
        else:
            yield span
        row += span.num_rows
