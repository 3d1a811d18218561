"""What an objective is: orders, noise, rows, losses. No megatron, no files."""
