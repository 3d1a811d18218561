"""The operations of a training step that concern its gradients."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_eso.training.distributed.parallel import model_parallel_groups
from megatron_eso.training.steps.train_state import build_train_state
from tests.ranks.training import open_batches, take_step
from tests.support.training import Overrides, tiny_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operations:
    """What a step has computed.

    Attributes:
        buckets: Elements of each buffer of gradients.
        multiplied: Elements of each tensor that was multiplied in place.
        num_accumulated: How often indexed elements were added, which torch sorts for.
    """

    buckets: list[int]
    multiplied: list[int]
    num_accumulated: int


class Watch(TorchDispatchMode):
    """The operations of torch while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.num_accumulated = 0
        self.multiplied: list[int] = []

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function).split(".")[1]
        self.num_accumulated += "index_put" in name and True in args[3:4]
        if name == "mul_" and isinstance(args[0], Tensor):
            self.multiplied.append(args[0].numel())
        return function(*args, **kwargs or {})


def watch_step(run: Path, data: Path, overrides: Overrides) -> Operations:
    """Take a step, and list its operations."""
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
        with Watch() as watch:
            take_step(config, state, batches, groups)
    return Operations(
        buckets=buckets, multiplied=watch.multiplied, num_accumulated=watch.num_accumulated
    )
