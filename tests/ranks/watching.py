"""Runs that are slow on one rank, stopped, or never finite."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch.distributed as dist
from megatron.core.utils import unwrap_model

from tests.ranks.loop import run_loop
from tests.support.training import Overrides

WORK_SECONDS = (1.0, 3.0)
"""What a forward pass of a layer takes on each rank, by the clock that the test gives it."""


def run_with_a_slow_rank(run: Path, data: Path, overrides: Overrides) -> str | None:
    """Train by a clock that moves with the forward passes, three times as far on rank 1."""
    seconds = 0.0

    def work(*_: Any) -> None:
        nonlocal seconds
        seconds += WORK_SECONDS[dist.get_rank()]

    def watch(trainer: Any, _gathered: list[Any]) -> None:
        layer = next(iter(unwrap_model(trainer.state.chunks[0]).decoder.layers))
        layer.register_forward_hook(work)

    clock = SimpleNamespace(perf_counter=lambda: seconds)
    with mock.patch("megatron_eso.training.guards.stragglers.time", clock):
        return run_loop(run, data, overrides, watch).error


def stop_at_step_3(trainer: Any, _gathered: list[Any]) -> None:
    def request_stop(*_: Any) -> None:
        if trainer.state.counters.step == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    next(iter(unwrap_model(trainer.state.chunks[0]).decoder.layers)).register_forward_hook(
        request_stop
    )


def never_finite(trainer: Any, _gathered: list[Any]) -> None:
    layer = next(iter(unwrap_model(trainer.state.chunks[0]).decoder.layers))
    layer.mlp.register_forward_hook(lambda _module, _inputs, output: (output[0] * np.nan, None))
