"""Converts a training state to the tensors of a checkpoint and `state.json`, and back.

The tensors are float32 and have global names: main parameters the model's names, Adam's moments
with `optimizer.state.{exp_avg,exp_avg_sq}.` before them, the EMA with `ema.`; a tied embedding is
stored once. The weights of a bf16 model are its rounded main parameters and are not stored. Every
optimizer of Megatron-Core reads this format on any layout. Megatron-Core's own format differs
between its optimizers, and torch's Adam cannot read that of the distributed one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_eso.runs.checkpoint import PREFIXES
from megatron_eso.runs.checkpoint_state import CheckpointState, read_checkpoint_state
from megatron_eso.training.checkpointing.files import read_parts
from megatron_eso.training.optimization.main_parameters import publish_main_parameters
from megatron_eso.training.optimization.optimizer import MOMENTS
from megatron_eso.training.optimization.tensor_parts import (
    TensorPart,
    parts_to_read,
    parts_to_write,
    share_values,
)
from megatron_eso.training.steps.train_state import TrainState


def describe_state(
    state: TrainState, samples: Mapping[str, Any], val_nelbo: float | None
) -> CheckpointState:
    """Return the content of a checkpoint's `state.json`.

    Args:
        state: The state to write.
        samples: The fields `noise_version` and `data`, from the run's samples.
        val_nelbo: The NELBO of the validation at this step, in nats per token; None without one.
    """
    return CheckpointState(
        kind="training",
        counters=state.counters,
        losses=state.losses,
        grad_norms=state.grad_norms,
        ema_updates=None if state.ema is None else state.ema.num_updates,
        init_version=state.init_version,
        torch_version=str(torch.__version__),
        val_nelbo=val_nelbo,
        **samples,
    )


@torch.no_grad()
def list_parts(state: TrainState, groups: ProcessGroupCollection) -> dict[str, list[TensorPart]]:
    """List the parts that this rank writes, by kind of state; no communication.

    Returns:
        Views of the state. Every kind has the same parts of the same parameters in the same order.
    """
    values: dict[str, list[Tensor | None]] = {"param": [p.main for p in state.parameters]}
    for name in MOMENTS:
        values[name] = [
            None if p.main is None else _moment(p.inner.state[p.main], name, p.main)
            for p in state.parameters
        ]
    if state.ema is not None:
        values["ema"] = state.ema.averages
    return {
        kind: list(parts_to_write(state.parameters, of_kind, PREFIXES[kind], groups.dp_cp))
        for kind, of_kind in values.items()
    }


def _moment(moments: Mapping[str, Tensor], name: str, main: Tensor) -> Tensor:
    """Return one of Adam's moments; zeros before the first update."""
    return moments[name] if name in moments else torch.zeros_like(main)


@torch.no_grad()
def load_weights(checkpoint: Path, state: TrainState, *, prefix: str = "") -> None:
    """Read only the weights of a checkpoint into the main parameters and the network; collective.

    Args:
        checkpoint: A checkpoint of any layout.
        state: Changed in place.
        prefix: Beginning of the names of the weights in the checkpoint, such as `ema.`.

    Raises:
        CheckpointError: The checkpoint is damaged, or has another model.
    """
    _read_values(checkpoint, state, {prefix: [p.main for p in state.parameters]})
    publish_main_parameters(state.chunks, state.optimizer)


def _read_values(
    checkpoint: Path, state: TrainState, values: Mapping[str, list[Tensor | None]]
) -> None:
    """Fill values of the parameters' ranges by the prefix of their names; collective."""
    group = state.dp_group
    wanted = [
        part
        for prefix, of_kind in values.items()
        for part in parts_to_read(state.parameters, of_kind, prefix, group)
    ]
    read_parts(checkpoint, wanted)
    for of_kind in values.values():
        share_values(state.parameters, of_kind, group)


@torch.no_grad()
def load_training_state(checkpoint: Path, state: TrainState) -> None:
    """Continue `state` from a checkpoint of any layout; collective over the world.

    From a checkpoint that holds only weights, moments and counters stay as they are.

    Raises:
        CheckpointError: The checkpoint is damaged, or has another format.
    """
    # Weights and counters.
    record = read_checkpoint_state(checkpoint)
    load_weights(checkpoint, state)
    if record.kind == "weights":
        if state.ema is not None:
            state.ema.restart()
        return
    state.counters, state.init_version = record.counters, record.init_version
    state.losses, state.grad_norms = record.losses, record.grad_norms
    # Moments and average, in one reading.
    wanted: dict[str, list[Tensor | None]] = {}
    for name in MOMENTS:
        moments = [None if p.main is None else torch.empty_like(p.main) for p in state.parameters]
        for parameter, moment in zip(state.parameters, moments, strict=True):
            if parameter.main is not None:
                parameter.inner.state[parameter.main][name] = moment
        wanted[PREFIXES[name]] = moments
    if state.ema is not None and record.ema_updates is not None:
        wanted[PREFIXES["ema"]] = state.ema.averages
    _read_values(checkpoint, state, wanted)
    _set_optimizer_step(state, record.counters.step - record.counters.skipped_steps)
    if state.ema is None:
        return
    if record.ema_updates is None:
        state.ema.restart()
    else:
        state.ema.num_updates = record.ema_updates


def _set_optimizer_step(state: TrainState, step: int) -> None:
    """Set Adam's number of updates: torch keeps it by tensor, fused optimizers by group."""
    for parameter in state.parameters:
        if parameter.main is not None and isinstance(parameter.inner, torch.optim.AdamW):
            parameter.inner.state[parameter.main]["step"] = torch.tensor(float(step))
    if not isinstance(state.parameters[0].inner, torch.optim.AdamW):
        for group in state.parameters[0].inner.param_groups:
            group["step"] = step
