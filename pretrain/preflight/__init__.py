"""The checks before a run: what each node finds, what the ranks measure, the verdict."""
