"""Checks during a run: hangs, stops, memory, stragglers, ranks with different data."""
