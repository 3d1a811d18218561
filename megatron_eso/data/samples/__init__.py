"""Which row of which dataset each sample of a run is."""
