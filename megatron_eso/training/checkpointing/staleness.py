"""Finds tensors of a save that are not the state: hashes do not, they certify any bytes.

A save is compared at fixed places, about 64 elements of every tensor, taken on the device and
fetched in one transfer. Two things are found:

- What was written is not what the state held at the moment of the save. That is certain, and the
  save fails.
- The network's parameter has moved since the save before, and what the checkpoint holds of it has
  not: the main parameter, a moment or the average is cut off from the network. That is a suspicion,
  and it is logged.

Shapes: P parts of tensors that this rank writes of one kind of state, S elements of them in the
sample. Every kind of state has the same parts, and so the same places.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from numpy.typing import NDArray
from torch import Tensor

from megatron_eso.errors import CheckpointError
from megatron_eso.training.checkpointing.tensor_parts import TensorPart, parts_to_write
from megatron_eso.training.optimization.optimizer import MOMENTS
from megatron_eso.training.steps.train_state import TrainState

SAMPLE_SIZE = 64
MAX_NAMED = 5
SMALLEST = float(np.finfo(np.float32).tiny)
"""Below it a moment may stand still honestly: its decay rounds to nothing."""
EPSILON = float(np.finfo(np.float32).eps)

Parts = Mapping[str, list[TensorPart]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StateSample:
    """Elements of a rank's state at the moment of a save."""

    kinds: Mapping[str, NDArray[np.float32]]
    """`[S]` by kind of state."""
    network_S: NDArray[np.float32]
    """What the network computes with."""
    starts_P: NDArray[np.int64]
    """First element of each part."""
    num_updates: int
    """Updates applied up to this moment."""
    rollbacks: int


def take_sample(state: TrainState, parts: Parts, groups: ProcessGroupCollection) -> StateSample:
    """Sample the state that a save is about to write; no communication.

    Args:
        state: The state.
        parts: What this rank writes, by kind of state.
        groups: Of the layout.
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
    """Refuse to publish parts that are not the state that was sampled.

    Args:
        sample: Taken at the moment of the save.
        written: The parts as they were written: copies, or the state itself.

    Raises:
        CheckpointError: Names the tensors.
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
    """List the tensors that have stood still while the network's parameter moved.

    Nothing is expected to move without an update, or across a rollback. Of a parameter that the
    network does not see moving, as at learning rate 0, nothing is expected either.

    Args:
        before: Of the save before.
        now: Of this save.
        parts: What this rank writes, by kind of state.
        decay: Of the moving average.
    """
    if now.num_updates <= before.num_updates or now.rollbacks != before.rollbacks:
        return []
    is_network_moved_S = before.network_S != now.network_S
    is_network_moved_P = _any_of_part(is_network_moved_S, now.starts_P)
    still = []
    for kind, value_S in now.kinds.items():
        if kind in MOMENTS:  # zero where no gradient was; where it is subnormal, decay does nothing
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
    """Return a line for the log."""
    return (
        f"{_name(still)}: not changed since the save before, though the network's parameter has: "
        f"do not rely on this checkpoint before you know why"
    )


def _pick(values: Tensor) -> Tensor:
    """Return a view of about 64 elements; an odd stride visits different columns of a matrix."""
    return values.view(-1)[:: max(1, values.numel() // SAMPLE_SIZE) | 1]


@torch.no_grad()
def _gather(kinds: list[list[TensorPart]]) -> list[NDArray[np.float32]]:
    """Fetch the sample `[S]` of each kind, in float32, in one transfer."""
    if not kinds[0]:
        return [np.zeros(0, np.float32) for _ in kinds]
    picked = [torch.cat([_pick(part.values) for part in parts]).float() for parts in kinds]
    return list(torch.stack(picked).cpu().numpy())


def _any_of_part(is_S: NDArray[np.bool_], starts_P: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether any element of each part is; `[P]`."""
    if not len(starts_P):
        return np.zeros(0, np.bool_)
    return np.logical_or.reduceat(is_S, starts_P)


def _name(keys: list[str]) -> str:
    more = f" and {len(keys) - MAX_NAMED} more" if keys[MAX_NAMED:] else ""
    return ", ".join(keys[:MAX_NAMED]) + more
