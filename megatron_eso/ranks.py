"""Which rank of the job this process is.

Rank 0 alone writes the files of a run, logs what every rank knows, and reports the error of a
command.
"""

import os
import sys
import time

REPORT_SECONDS = 10.0
"""Time that rank 0 has to report an error which all ranks meet."""


def own_rank() -> int:
    """This process's rank in the world; before a process group exists, the launcher's number."""
    # Commands that report a wrong configuration do not wait for torch to be imported.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        return int(distributed.get_rank())
    return int(os.environ.get("RANK", "0"))


def is_first_rank() -> bool:
    """Whether this process is rank 0 of the world."""
    return own_rank() == 0


def launched_world_size() -> int:
    """Number of ranks that the launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_first_rank() -> None:
    """Wait, on a rank other than 0, while rank 0 reports an error that all ranks meet.

    A launcher ends all ranks when one has ended. A rank that still runs after this time has met an
    error of its own.
    """
    if not is_first_rank():
        time.sleep(REPORT_SECONDS)
