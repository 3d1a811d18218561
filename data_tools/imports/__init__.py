"""Token files of other programs to datasets."""
