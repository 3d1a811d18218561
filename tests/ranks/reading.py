"""Checkpoints read on another layout, and the bytes that this takes."""

import dataclasses
from pathlib import Path

import torch.distributed as dist

from megatron_eso.training.checkpointing.state import list_parts, load_training_state
from megatron_eso.training.distributed.parallel import model_parallel_groups
from megatron_eso.training.steps.train_state import build_train_state
from tests.support.training import Overrides, tiny_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes that a rank has read, and its share of those that all ranks need."""

    read: int
    needed: int


def count_read() -> int:
    """Return the bytes that this process has read since its start, from the cache or not."""
    (line,) = [line for line in Path("/proc/self/io").read_text().splitlines() if "rchar" in line]
    return int(line.split()[1])


def read_state(run: Path, data: Path, overrides: Overrides, checkpoint: Path) -> Bytes:
    """Load a state on this layout; every element is needed by one rank of those that hold it."""
    config = tiny_config(run, data, overrides)
    with model_parallel_groups(config.parallel) as groups:
        state = build_train_state(config, groups)
        before = count_read()
        load_training_state(checkpoint, state)
        read = count_read() - before
        parts = list_parts(state, groups)
    dist.barrier()
    needed = sum(part.values.nbytes for of_kind in parts.values() for part in of_kind)
    return Bytes(read=read, needed=needed)
