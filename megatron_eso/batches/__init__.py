"""Micro-batches as rows: dealing of samples, packing of rows, losses and counts of rows."""
