"""The checkpoints of a training run: their content, when they are written, how they are read."""
