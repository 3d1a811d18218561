"""The run directory and its checkpoint format, for all who read or write one. No megatron."""
