"""Collectives of torch.distributed: what they transfer, and how long that takes on stated links.

Under a dispatch mode every collective is an operation of the namespace `c10d`. The recorder
answers it with a `Work` that makes the timeline wait.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work
from torch.utils._pytree import tree_leaves

from megatron_eso.estimates.gpus import EFFICIENCY, GPUS_PER_NODE, Gpu
from megatron_eso.simulation.timeline import Timeline

# Operation -> name, and how often each byte crosses the slowest link of a large group.
KINDS = {
    "c10d::allreduce_": ("all-reduce", 2.0),
    "c10d::allreduce_coalesced_": ("all-reduce", 2.0),
    "c10d::_allgather_base_": ("all-gather", 1.0),
    "c10d::allgather_": ("all-gather", 1.0),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", 1.0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1.0),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1.0),
    "c10d::broadcast_": ("broadcast", 1.0),
    "c10d::send": ("send", 1.0),
    "c10d::recv_": ("receive", 1.0),
    "c10d::barrier": ("barrier", 0.0),
}
POINT_TO_POINT = ("c10d::send", "c10d::recv_")
# The beginning of a group's description in Megatron-Core -> purpose.
PURPOSES = {
    "TENSOR_MODEL": "tensor",
    "PIPELINE": "pipeline",
    "EMBEDDING": "embedding",
    "POSITION": "embedding",
    "DATA": "data",
    "INTRA_PARTIAL_DATA": "data",
    "INTRA_DISTRIBUTED_OPTIMIZER": "data",
}


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective of this rank.

    Attributes:
        name: What it does.
        purpose: Which parallelism it serves.
        ranks: Ranks that take part.
        size: Bytes of the whole message: of the longer of its input and output.
        seconds: How long it takes.
    """

    name: str
    purpose: str
    ranks: int
    size: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Message:
    """What a call of a collective transfers.

    Attributes:
        purpose: Which parallelism it serves.
        members: Ranks that take part.
        size: Bytes of the longer of its input and output.
    """

    purpose: str
    members: Sequence[int]
    size: int


def read_message(operation: str, arguments: Sequence[Any]) -> Message:
    """Read the arguments of an operation of `c10d`."""
    tensors = [_count_bytes(each) for each in arguments[:2]]
    (boxed,) = (
        each
        for each in arguments
        if isinstance(each, torch.ScriptObject) and "ProcessGroup" in str(each._type())
    )
    group = ProcessGroup.unbox(boxed)
    members = dist.get_process_group_ranks(group)
    if operation in POINT_TO_POINT:
        members = [dist.get_rank(), members[arguments[2]]]
    return Message(find_purpose(group), members, max(tensors))


def describe_collective(operation: str, arguments: Sequence[Any], gpu: Gpu) -> Collective:
    """Read a call of an operation of `c10d`, and find how long it takes.

    Raises:
        KeyError: The operation is not known.
    """
    name, factor = KINDS[operation]
    message = read_message(operation, arguments)
    members = message.members
    share = 1.0 if operation in POINT_TO_POINT else (len(members) - 1) / len(members)
    seconds = factor * share * message.size / find_bandwidth(members, gpu)
    if len(members) > 1:
        seconds = max(seconds, EFFICIENCY.link_seconds)
    return Collective(name, message.purpose, len(members), message.size, seconds)


def find_bandwidth(members: Sequence[int], gpu: Gpu) -> float:
    """Return the bytes/s that a ring of these ranks reaches in each direction.

    Within a node it is NVLink's. Across nodes, the ring uses the network adapters of all members
    in a node, and is as slow as the slower of both.
    """
    nodes = {member // GPUS_PER_NODE for member in members}
    per_node = len(members) / len(nodes)
    slowest = gpu.nvlink if len(nodes) == 1 else min(gpu.nvlink, per_node * gpu.network)
    return slowest * EFFICIENCY.link


def find_purpose(group: ProcessGroup) -> str:
    """Return which parallelism a group serves."""
    found = (name for start, name in PURPOSES.items() if group.group_desc.startswith(start))
    return next(found, "world")


def _count_bytes(value: Any) -> int:
    leaves = tree_leaves(value)
    return sum(each.numel() * each.element_size() for each in leaves if isinstance(each, Tensor))


class TimedWork(Work):
    """A collective under way; whoever waits for it moves the timeline."""

    def __init__(self, timeline: Timeline, purpose: str, end: float) -> None:
        super().__init__()
        self._timeline, self._purpose, self._end = timeline, purpose, end

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Let the kernels that follow wait for its end."""
        self._timeline.wait(self._purpose, self._end)
        return True

    def is_completed(self) -> bool:
        """Return whether it is done, which nobody has to wait for."""
        return True
