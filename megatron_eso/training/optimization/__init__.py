"""The optimizer, the main parameters that it steps, and their moving average."""
