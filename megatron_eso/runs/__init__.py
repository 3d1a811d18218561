"""The run directory and its checkpoint format, for readers and writers, without megatron."""
