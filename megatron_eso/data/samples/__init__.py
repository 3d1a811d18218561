"""The data row, and its dataset, of each sample of a run."""
