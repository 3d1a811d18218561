"""Keeps an exponential moving average of the main parameters, in float32 and sharded like them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_eso.training.optimization.main_parameters import (
    MainParameter,
    publish_main_parameters,
)


class ExponentialMovingAverage:
    """The moving average of the main parameters.

    As in the reference's models/ema.py, the decay of update n is min(d, (1 + n) / (10 + n)).

    Args:
        parameters: The main parameters; the average starts at their values.
        decay: d, in (0, 1).
    """

    def __init__(self, parameters: list[MainParameter], decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.mains: list[Tensor | None] = [parameter.main for parameter in parameters]
        self.averages = [None if main is None else main.detach().clone() for main in self.mains]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters; no communication."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(*self._pairs(), 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Set the average to the present values of the parameters, and count updates from 0."""
        self.num_updates = 0
        for average, main in zip(*self._pairs(), strict=True):
            average.copy_(main)

    @contextmanager
    def applied(
        self, chunks: list[DistributedDataParallel], optimizer: ChainedOptimizer
    ) -> Iterator[None]:
        """Use the average as the network's weights inside the context; collective over DP."""
        averages, mains = self._pairs()
        raw = [main.detach().clone() for main in mains]
        self._replace(averages, chunks, optimizer)
        try:
            yield
        finally:
            self._replace(raw, chunks, optimizer)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        averages = [average for average in self.averages if average is not None]
        return averages, [main for main in self.mains if main is not None]

    @torch.no_grad()
    def _replace(
        self,
        values: list[Tensor],
        chunks: list[DistributedDataParallel],
        optimizer: ChainedOptimizer,
    ) -> None:
        for main, value in zip(self._pairs()[1], values, strict=True):
            main.copy_(value)
        publish_main_parameters(chunks, optimizer)
