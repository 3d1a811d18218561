"""What watches a run: hangs, stops, memory, stragglers, ranks that disagree."""
