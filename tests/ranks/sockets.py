"""Sockets of a rank, counted around a group over the world as a run on GPUs makes it for saves."""

import os
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from megatron_eso.training.distributed.device import set_defaults
from tests.support.configs import make_config


def count_new_sockets(*, has_defaults: bool) -> tuple[int, int]:
    """Return the sockets that a gloo group adds when it is made, and after a sum over its ranks.

    Args:
        has_defaults: Whether the variables that `set_defaults` sets are set.
    """
    with mock.patch.dict(os.environ):
        os.environ.pop("TORCH_GLOO_LAZY_INIT", None)
        if has_defaults:
            set_defaults(make_config())
        before = count_sockets()
        group = dist.new_group(backend="gloo")
        made = count_sockets() - before
        dist.barrier()  # of the world's own group: no rank connects before all have counted
        dist.all_reduce(torch.ones(8), group=group)
        used = count_sockets() - before
        dist.barrier()
        dist.destroy_process_group(group)
    return made, used


def count_sockets() -> int:
    """Return the open sockets of this process."""
    names = (os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink())
    return sum(name.startswith("socket:") for name in names)
