"""Functions that run on the ranks of `world.run`, which imports them in worker processes."""
