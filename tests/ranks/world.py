"""Functions that end in every way in which a call of `world.run` can end."""

import os
import sys
import time

import torch
import torch.distributed as dist


def add_up(start: int) -> int:
    tensor = torch.tensor(start + dist.get_rank())
    dist.all_reduce(tensor)
    return int(tensor)


def find_loaded(*names: str) -> list[str]:
    return [name for name in names if name in sys.modules]


def count_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def describe_process() -> tuple[int, int, str | None]:
    return os.getpid(), torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")


def fail_on_one_rank(failing_rank: int) -> None:
    if dist.get_rank() == failing_rank:
        raise KeyError("no such slot")
    dist.barrier()


def return_what_does_not_pickle() -> object:
    return lambda: None


def die_on_one_rank(dying_rank: int) -> None:
    if dist.get_rank() == dying_rank:
        os._exit(3)
    dist.barrier()


def hang_on_one_rank(hanging_rank: int) -> None:
    if dist.get_rank() == hanging_rank:
        time.sleep(600)
