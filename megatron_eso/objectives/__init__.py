"""Objectives: orders, noise, rows and losses, without megatron or files."""
