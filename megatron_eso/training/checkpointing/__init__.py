"""Checkpoints of a run that trains: what to write, when, and how to continue from it."""
