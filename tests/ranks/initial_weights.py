"""Initial weights on ranks: how many are drawn, and when none are."""

import dataclasses
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.training.distributed.parallel import model_parallel_groups
from megatron_eso.training.job import restore_state
from tests.ranks.training import open_batches
from tests.support.training import Overrides, tiny_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """Elements of normally distributed weights on a rank.

    Attributes:
        drawn: That were drawn.
        held: That the rank holds in its optimizer.
    """

    drawn: int
    held: int


class NormalDraws(TorchDispatchMode):
    """The number of normally distributed values that torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if str(function).startswith(("aten.normal_", "aten.erfinv")):
            self.count += args[0].numel()
        return function(*args, **kwargs or {})


def start(run: Path, data: Path, overrides: Overrides) -> Drawn:
    """Start a run, or continue it where there is a checkpoint, and save."""
    config = tiny_config(run, data, overrides)
    with model_parallel_groups(config.parallel) as groups:
        batches = open_batches(config, groups.dp.size())
        with NormalDraws() as draws:
            state, checkpoints = restore_state(config, batches, RunDirectory(run), groups)
        checkpoints.save(state, config, groups)
    held = sum(p.end - p.start for p in state.parameters if p.model.dim() > 1)
    return Drawn(drawn=draws.count, held=held)
