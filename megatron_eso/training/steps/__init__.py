"""A training step: its batches, the state that it changes, and the evaluation of that state."""
