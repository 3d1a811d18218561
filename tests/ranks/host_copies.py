"""The memory that saves in the background take on a rank."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from megatron_eso.training.checkpointing.checkpoints import Checkpoints
from megatron_eso.training.checkpointing.state import list_parts
from megatron_eso.training.distributed.parallel import model_parallel_groups
from megatron_eso.training.steps.train_state import build_train_state
from tests.ranks.training import open_batches, take_step
from tests.support.training import Overrides, tiny_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """The tensors that were made to prepare a save, and where its copies lie."""

    num_parts: int
    blocks: int
    zeros: int
    bytes_spanned: int
    """From the first byte of any copy to the last byte of any."""
    bytes_copied: int


class Made(TorchDispatchMode):
    """The number of tensors that were made, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if str((kwargs or {}).get("device")) != "meta":
            self.count[str(function).split(".")[1]] += 1
        return function(*args, **kwargs or {})


def measure_memory(run: Path, data: Path, overrides: Overrides) -> Memory:
    """Take the memory of saves after a step."""
    config = tiny_config(run, data, overrides)
    with model_parallel_groups(config.parallel) as groups:
        batches = open_batches(config, groups.dp.size())
        state = build_train_state(config, groups)
        checkpoints = Checkpoints(run / "checkpoints", config.checkpoint, batches)
        take_step(config, state, batches, groups)
        with Made() as made:
            checkpoints.prepare(state, groups)
        parts = checkpoints._host.copy(list_parts(state, groups))
    copies = [part.values for of_kind in parts.values() for part in of_kind]
    starts = [copy.data_ptr() for copy in copies]
    ends = [copy.data_ptr() + copy.nbytes for copy in copies]
    return Memory(
        num_parts=len(copies),
        blocks=made.count["empty"],
        zeros=made.count["zeros_like"],
        bytes_spanned=max(ends) - min(starts),
        bytes_copied=sum(copy.nbytes for copy in copies),
    )
