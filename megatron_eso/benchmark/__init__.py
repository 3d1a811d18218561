"""A training step measured on the ranks that were launched: its time, its parts, its memory."""
