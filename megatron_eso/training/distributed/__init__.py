"""The ranks of a job: their process groups, and Megatron-Core on machines without a GPU."""
