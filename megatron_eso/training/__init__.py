"""The training of a run: step, loop, optimizer, evaluation, and how they are built."""
