"""Finds tensors of a checkpoint that are not the state of the run; hashes cannot find them.

About 64 elements of every tensor, always the same ones, are collected on the device and copied to
the host in one transfer. They show two faults:

- The written values differ from the state at the moment of the save. This is certain: the save
  fails.
- The network's parameter has changed since the previous save, but the main parameter, a moment or
  the average has not. They may no longer be connected. This is a suspicion: it is logged.

Shapes: P parts of tensors that this rank writes of one kind of state, S sampled elements of them.
Every kind of state has the same parts, and so the same sampled elements.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from numpy.typing import NDArray
from torch import Tensor

from megatron_eso.errors import CheckpointError
from megatron_eso.training.optimization.optimizer import MOMENTS
from megatron_eso.training.optimization.tensor_parts import TensorPart, parts_to_write
from megatron_eso.training.steps.train_state import TrainState

SAMPLE_SIZE = 64
MAX_NAMED = 5
SMALLEST = float(np.finfo(np.float32).tiny)
"""A smaller moment may be unchanged without a fault, because its decay rounds to zero."""
EPSILON = float(np.finfo(np.float32).eps)

Parts = Mapping[str, list[TensorPart]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StateSample:
    """Sampled elements of a rank's state at the moment of a save."""

    kinds: Mapping[str, NDArray[np.float32]]
    """Elements `[S]` of each kind of state."""
    network_S: NDArray[np.float32]
    """The same elements of the parameters that the network computes with."""
    starts_P: NDArray[np.int64]
    """The number of the first sampled element of each part."""
    num_updates: int
    """Updates that were applied before the save."""
    rollbacks: int
    """Rollbacks before the save."""


def take_sample(state: TrainState, parts: Parts, groups: ProcessGroupCollection) -> StateSample:
    """Sample the state that a save is about to write; no communication.

    Args:
        state: The state.
        parts: The parts that this rank writes, by kind of state.
        groups: The groups of the layout.
    """
    network = [
        p.model.detach().view(-1)[p.start : p.end] if p.main is not None else None
        for p in state.parameters
    ]
    network_parts = list(parts_to_write(state.parameters, network, "", groups.dp_cp))
    names = [*parts, "network"]
    values = _gather([*parts.values(), network_parts])
    sizes = [len(_pick(part.values)) for part in network_parts]
    counters = state.counters
    return StateSample(
        kinds=dict(zip(names[:-1], values[:-1], strict=True)),
        network_S=values[-1],
        starts_P=np.cumsum([0, *sizes], dtype=np.int64)[:-1],
        num_updates=counters.step - counters.skipped_steps,
        rollbacks=counters.rollbacks,
    )


def refuse_stale(sample: StateSample, written: Parts) -> None:
    """Refuse written parts that differ from the sampled state.

    Args:
        sample: The sample from the moment of the save.
        written: The parts that were written: copies of the state, or the state itself.

    Raises:
        CheckpointError: Values differ; the message names the tensors.
    """
    stale = []
    values = _gather(list(written.values()))
    for (kind, parts), found_S in zip(written.items(), values, strict=True):
        differs_S = found_S.view(np.int32) != sample.kinds[kind].view(np.int32)
        differs_P = _any_of_part(differs_S, sample.starts_P)
        stale += [part.key for part, differs in zip(parts, differs_P, strict=True) if differs]
    if stale:
        raise CheckpointError(
            f"what was written of {_name(stale)} is not the state at the moment of the save; set "
            f"checkpoint.async_save = false if that happens again"
        )


def find_still(before: StateSample, now: StateSample, parts: Parts, decay: float) -> list[str]:
    """List the tensors that have not changed although the network's parameter has.

    Without an update, across a rollback, or where the network's parameter has not changed (as at
    learning rate 0), no change is expected.

    Args:
        before: The sample of the previous save.
        now: The sample of this save.
        parts: The parts that this rank writes, by kind of state.
        decay: The decay of the moving average.

    Returns:
        The keys of the tensors.
    """
    if now.num_updates <= before.num_updates or now.rollbacks != before.rollbacks:
        return []
    is_network_moved_S = before.network_S != now.network_S
    is_network_moved_P = _any_of_part(is_network_moved_S, now.starts_P)
    still = []
    for kind, value_S in now.kinds.items():
        if kind in MOMENTS:  # zero without a gradient; too small to decay if it is subnormal
            must_move_S = np.abs(value_S) >= SMALLEST
        elif kind == "ema":
            pull_S = (1 - decay) * np.abs(now.kinds["param"] - value_S)
            must_move_S = pull_S > 4 * EPSILON * np.abs(value_S)
        else:
            must_move_S = is_network_moved_S
        is_still_P = ~_any_of_part(before.kinds[kind] != value_S, now.starts_P)
        suspect_P = is_network_moved_P & is_still_P & _any_of_part(must_move_S, now.starts_P)
        still += [part.key for part, is_it in zip(parts[kind], suspect_P, strict=True) if is_it]
    return still


def describe_still(still: list[str]) -> str:
    """Return the log line about the tensors that `find_still` has listed."""
    return (
        f"{_name(still)}: not changed since the previous save, though the network's parameter has: "
        f"do not rely on this checkpoint before you know why"
    )


def _pick(values: Tensor) -> Tensor:
    """Return a view of about 64 elements, from different columns of a matrix by an odd stride."""
    return values.view(-1)[:: max(1, values.numel() // SAMPLE_SIZE) | 1]


@torch.no_grad()
def _gather(kinds: list[list[TensorPart]]) -> list[NDArray[np.float32]]:
    """Copy the sample `[S]` of each kind to the host, in float32, in one transfer."""
    if not kinds[0]:
        return [np.zeros(0, np.float32) for _ in kinds]
    picked = [torch.cat([_pick(part.values) for part in parts]).float() for parts in kinds]
    return list(torch.stack(picked).cpu().numpy())


def _any_of_part(is_S: NDArray[np.bool_], starts_P: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return `[P]`: whether the condition holds for any sampled element of each part."""
    if not len(starts_P):
        return np.zeros(0, np.bool_)
    return np.logical_or.reduceat(is_S, starts_P)


def _name(keys: list[str]) -> str:
    more = f" and {len(keys) - MAX_NAMED} more" if keys[MAX_NAMED:] else ""
    return ", ".join(keys[:MAX_NAMED]) + more
