"""Which rank of the job this process is.

Rank 0 alone writes the files of a run, logs what every rank knows, and reports the error of a
command.
"""

import os

import torch.distributed as dist


def own_rank() -> int:
    """This process's rank in the world; before a process group exists, the launcher's number."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def is_first_rank() -> bool:
    """Whether this process is rank 0 of the world."""
    return own_rank() == 0


def launched_world_size() -> int:
    """Number of ranks that the launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
