"""Sets of tokens that are predicted at once, each from the sets before it."""

from dataclasses import replace

from megatron_eso.batches.rows import MicroBatch, Reading, Span


def predict_in_sets(micro_batch: MicroBatch, set_size: int, *, reads_masks: bool) -> MicroBatch:
    """Return the plan of a parallel schedule from that of an order with every token masked.

    A query reads the clean tokens of the sets before its own, as a mask of a sampler's step does.
    The sum of a sample's losses is its exact negative log-likelihood under this schedule. With sets
    of one token the plan reads what it did before.

    Args:
        micro_batch: Clean streams, followed by a query for every token.
        set_size: Consecutive slots of a set; the last set of a stream may be smaller.
        reads_masks: Whether a query also reads the queries of its set before its own slot.
    """
    rows = micro_batch.rows
    queries_E = rows.loss_rows_E[: rows.num_loss_rows]
    reads_4R = rows.reads_4R.clone()
    # A query reads as many clean tokens as the number of its slot, so far.
    place_E = reads_4R[1, queries_E] % set_size
    reads_4R[1, queries_E] -= place_E
    if reads_masks:
        reads_4R[2, queries_E] -= place_E
        reads_4R[3, queries_E] += place_E
    # Each query is a block of one row; the attention joins blocks to tiles.
    queries = tuple(Span(Reading.BLOCK, 1, *reads) for reads in reads_4R[:, queries_E].T.tolist())
    streams = tuple(span for span in rows.spans if span.reading is not Reading.STRICT)
    changed = replace(rows, reads_4R=reads_4R, spans=streams + queries, loss_spans=queries)
    return replace(micro_batch, rows=changed, block=None)
