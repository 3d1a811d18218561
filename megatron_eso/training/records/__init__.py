"""The numbers of a run: their tags, and the files that they go to."""
