"""The process groups of a job, and Megatron-Core on machines without a GPU."""
