"""A step, and all that it takes and changes: batches, state, update, counters, evaluation."""
