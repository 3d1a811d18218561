"""The Eso-LM on Megatron-Core: layers, attention over rows, head and initial weights."""
