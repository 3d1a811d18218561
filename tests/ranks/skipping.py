"""Steps whose update must not be applied: what spoils them and what watches them."""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model

from megatron_eso.training.checkpointing.checkpoints import Checkpoints
from megatron_eso.training.checkpointing.restore import restore
from megatron_eso.training.distributed.parallel import model_parallel_groups
from megatron_eso.training.steps.train_state import build_train_state
from tests.ranks.training import open_batches, take_step
from tests.support.training import Overrides, tiny_config

BATCH = 8  # samples of a step
BAD_STEP, BAD_RANK = 3, 1


def find_layer(trainer: Any) -> torch.nn.Module:
    """Return the first layer on this rank."""
    return next(iter(unwrap_model(trainer.state.chunks[0]).decoder.layers))


def find_head(trainer: Any) -> torch.nn.Module:
    """Return the output layer, or the first layer on a rank without one."""
    head = getattr(unwrap_model(trainer.state.chunks[-1]), "output_layer", None)
    return head or find_layer(trainer)


def spoil_output(trainer: Any, factors: dict[int, float], rank: int) -> None:
    """Multiply what a module of a rank gives, at given numbers of samples consumed before."""

    def spoil(module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        factor = factors.get(trainer.state.counters.consumed_samples, 1.0)
        if not module.training or factor == 1.0:
            return output
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        return (hidden * factor, *rest) if rest else hidden * factor

    if dist.get_rank() == rank:
        find_head(trainer).register_forward_hook(spoil)


def spoil_gradient(trainer: Any, step: int, rank: int) -> None:
    """Not finite in the gradient of a norm, which tensor-parallel ranks have in common."""

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan if trainer.state.counters.step == step - 1 else gradient

    if dist.get_rank() == rank:
        name, norm = next(
            (name, parameter)
            for name, parameter in find_layer(trainer).named_parameters()
            if parameter.dim() == 1 and not getattr(parameter, "tensor_model_parallel", False)
        )
        norm.register_hook(spoil)


def snapshot(trainer: Any) -> dict[str, str]:
    """Hashes of what a step may change: weights, main parameters, moments, average."""
    state = trainer.state
    kinds: dict[str, list[Any]] = {
        "model": [parameter.model for parameter in state.parameters],
        "main": [parameter.main for parameter in state.parameters],
        "ema": list(state.ema.averages),
    }
    for name in ("exp_avg", "exp_avg_sq"):
        kinds[name] = [
            p.inner.state[p.main].get(name) for p in state.parameters if p.main is not None
        ]
    found = {}
    for kind, tensors in kinds.items():
        hasher = hashlib.sha256()
        for tensor in tensors:
            if tensor is not None:
                hasher.update(tensor.detach().float().numpy().tobytes())
        found[kind] = hasher.hexdigest()
    return found


def watch(trainer: Any, gathered: list[Any]) -> None:
    """Gather the state after every step."""
    take_step = type(trainer).take_step

    def watched(self: Any, *arguments: Any) -> None:
        take_step(self, *arguments)
        gathered.append((self.state.counters, snapshot(self)))

    # Slots: the class, in this worker, for this run.
    type(trainer).take_step = watched
    trainer_class = type(trainer)
    restore_after(trainer_class, take_step)


def restore_after(trainer_class: Any, take_step: Any) -> None:
    train = trainer_class.train

    def trained(self: Any) -> Any:
        try:
            return train(self)
        finally:
            trainer_class.take_step, trainer_class.train = take_step, train

    trainer_class.train = trained


def spoil_and_watch(trainer: Any, gathered: list[Any], where: str) -> None:
    if where == "output":
        spoil_output(trainer, {BATCH * (BAD_STEP - 1): math.nan}, BAD_RANK)
    else:
        spoil_gradient(trainer, BAD_STEP, BAD_RANK)
    watch(trainer, gathered)


def spoil(trainer: Any, _gathered: list[Any], factors: dict[int, float]) -> None:
    spoil_output(trainer, factors, BAD_RANK)


def continue_elsewhere(run: Path, data: Path, overrides: Overrides, consumed: int) -> list[float]:
    """Take the oracle's steps from a checkpoint on, with the samples after `consumed`."""
    config = tiny_config(run, data, overrides)
    losses = []
    with model_parallel_groups(config.parallel) as groups:
        batches = open_batches(config, groups.dp.size())
        state = build_train_state(config, groups)
        restore(state, config, Checkpoints(run / "checkpoints", config.checkpoint, batches))
        state.counters = dataclasses.replace(state.counters, consumed_samples=consumed)
        while state.counters.step < config.train.num_steps:
            losses.append(take_step(config, state, batches, groups).loss)
    return losses
