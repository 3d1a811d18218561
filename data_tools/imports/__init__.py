"""Makes datasets from token files of other programs."""
