"""Copies the state to host memory, which all saves in the background reuse."""

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_eso.training.checkpointing.staleness import Parts
from megatron_eso.training.optimization.tensor_parts import TensorPart

ALIGNMENT = 64
"""Bytes that a copy's first byte is a multiple of."""
PORTABLE = 1
"""CUDA's flag of memory that is pinned for every GPU."""

logger = logging.getLogger(__name__)


class HostCopies:
    """One block of host memory with a copy of every part that this rank writes.

    A copy into new memory takes many times as long. For tensors of a GPU the block is pinned, by
    one call and without rounding: torch's own pinned memory takes a power of two for each tensor.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    @torch.no_grad()
    def copy(self, parts: Parts) -> Parts:
        """Return copies of the parts; they overwrite the copies of the previous call.

        Args:
            parts: The parts, of the same keys and shapes in every call.
        """
        if not self._copies:
            self._take_memory([part for of_kind in parts.values() for part in of_kind])
        copies = {kind: [self._copy_part(part) for part in parts[kind]] for kind in parts}
        torch.cuda.synchronize()
        return copies

    def _copy_part(self, part: TensorPart) -> TensorPart:
        copy = self._copies[part.key, part.offsets]
        copy.copy_(part.values, non_blocking=True)
        return replace(part, values=copy)

    def _take_memory(self, parts: list[TensorPart]) -> None:
        """Take the block, and divide it among the parts."""
        sizes = [-(-part.values.nbytes // ALIGNMENT) * ALIGNMENT for part in parts]
        block = torch.empty(sum(sizes), dtype=torch.uint8)
        if block.numel() and parts[0].values.is_cuda:
            _pin(block)
        memory, start = block.numpy().data, 0
        for part, size in zip(parts, sizes, strict=True):
            # Not by views of the block: a copy is written as one storage.
            values = part.values
            copy = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=start)
            self._copies[part.key, part.offsets] = copy.view(values.shape)
            start += size


def _pin(block: Tensor) -> None:
    """Pin a block of host memory; without that, copies are right but hold up the steps longer."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = int(runtime.cudaHostRegister(block.data_ptr(), block.nbytes, PORTABLE))
    if error:
        logger.warning(
            "%.1f GiB of host memory for saves could not be pinned (CUDA error %d): a save holds "
            "up the steps longer; ulimit -l shows how much this process may pin",
            block.nbytes / 2**30,
            error,
        )
