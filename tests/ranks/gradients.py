"""Gradients of training steps, and what data parallelism does to them."""

from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from megatron_eso.training.distributed.parallel import model_parallel_groups
from megatron_eso.training.steps.train_state import build_train_state
from tests.ranks.training import open_batches, take_step
from tests.support.training import Overrides, tiny_config


class Multiplied(TorchDispatchMode):
    """The sizes of the tensors that are multiplied in place."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if str(function).startswith("aten.mul_"):
            self.sizes.append(args[0].numel())
        return function(*args, **kwargs or {})


def count_scaled_elements(run: Path, data: Path, overrides: Overrides) -> tuple[int, int]:
    """Take a step; return the elements of the gradient buffers, and how many were multiplied."""
    config = tiny_config(run, data, overrides)
    with model_parallel_groups(config.parallel) as groups:
        batches = open_batches(config, groups.dp.size())
        state = build_train_state(config, groups)
        buckets = [
            bucket.grad_data.numel()
            for chunk in state.chunks
            for group in chunk.bucket_groups
            for bucket in group.buckets
        ]
        with Multiplied() as multiplied:
            take_step(config, state, batches, groups)
    return sum(buckets), sum(size for size in multiplied.sizes if size in buckets)
