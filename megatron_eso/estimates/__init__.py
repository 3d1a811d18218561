"""What a run will take, from its configuration alone: parameters, FLOPs, memory, disk."""
