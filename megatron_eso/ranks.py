"""The rank of this process in its job.

Only rank 0 writes the files of a run, logs what all ranks know, and reports the error of a command.
"""

import os
import sys


def own_rank() -> int:
    """Return the rank of this process; without a process group, that of the launcher."""
    # torch is not imported here, so that a wrong configuration is reported without delay.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        return int(distributed.get_rank())
    return int(os.environ.get("RANK", "0"))


def is_first_rank() -> bool:
    """Return whether this process is rank 0 of the world."""
    return own_rank() == 0


def launched_world_size() -> int:
    """Return the number of ranks that the launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
