"""Which rank of the job this process is, and whether it is the first one.

Ranks differ only in what rank 0 does for all: it writes the files of the run, logs what every rank
knows, and reports the error of a command.
"""

import os
import sys


def own_rank() -> int:
    """This process's rank in the world; before a process group exists, the launcher's number."""
    # torch is not imported for it: commands check their configuration before they import it.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    return int(os.environ.get("RANK", "0"))


def is_first_rank() -> bool:
    """Whether this process is rank 0 of the world."""
    return own_rank() == 0


def launched_world_size() -> int:
    """Number of ranks that the launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
