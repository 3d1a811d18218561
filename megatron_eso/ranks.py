"""The rank of this process in its job.

Only rank 0 writes the files of a run, logs what all ranks know, and reports the error of a command.
"""

import os
import sys
import time

REPORT_SECONDS = 10.0
"""Time that rank 0 has to report an error which all ranks meet."""


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


def local_rank() -> int:
    """Return the number of this rank on its node; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def num_local_ranks() -> int:
    """Return the number of ranks on this node; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def choose_gpu(number: int, num_visible: int) -> int | None:
    """Return the index of the GPU that a rank uses; None if there is none for it.

    Args:
        number: The local rank.
        num_visible: GPUs that the rank finds; a launcher may show each rank its own only.
    """
    index = number if num_visible > 1 else 0
    return index if index < num_visible else None


def wait_for_first_rank() -> None:
    """Wait, on a rank other than 0, while rank 0 reports an error that all ranks meet.

    A launcher ends all ranks when one has ended. A rank that still runs after this time has met an
    error of its own.
    """
    if not is_first_rank():
        time.sleep(REPORT_SECONDS)
