"""What a dataset holds, whether it is sound, and what a run reads of it."""
