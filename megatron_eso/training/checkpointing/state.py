"""What of a training state a checkpoint holds: float32 tensors by global name, and `state.json`.

Main parameters go by the model's names, Adam's moments under
`optimizer.state.{exp_avg,exp_avg_sq}.`, the EMA under `ema.`, a tied embedding once. The weights
that a bf16 model computes with are its main parameters rounded, so they are not stored.
Megatron-Core's own optimizer format differs between its optimizers, and its distributed one cannot
be loaded into torch's Adam; this one is read by any of them on any layout.
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
from megatron_eso.training.checkpointing.tensor_parts import (
    TensorPart,
    parts_to_read,
    parts_to_write,
)
from megatron_eso.training.optimization.main_parameters import publish_main_parameters
from megatron_eso.training.optimization.optimizer import MOMENTS
from megatron_eso.training.steps.train_state import TrainState


def describe_state(
    state: TrainState, samples: Mapping[str, Any], val_nelbo: float | None
) -> CheckpointState:
    """Return what `state.json` of a checkpoint states.

    Args:
        state: The state that is saved.
        samples: `noise_version` and `data` of the run's samples.
        val_nelbo: Of the validation at this step, if there was one.
    """
    return CheckpointState(
        kind="training",
        counters=state.counters,
        losses=state.losses,
        grad_norms=state.grad_norms,
        ema_updates=None if state.ema is None else state.ema.num_updates,
        torch_version=str(torch.__version__),
        val_nelbo=val_nelbo,
        **samples,
    )


@torch.no_grad()
def list_parts(state: TrainState, groups: ProcessGroupCollection) -> dict[str, list[TensorPart]]:
    """List what this rank writes by kind of state: views of the state; no communication.

    The lists have the same parts of the same parameters in the same order.
    """
    values: dict[str, list[Tensor | None]] = {"param": [p.main for p in state.parameters]}
    for name in MOMENTS:
        values[name] = [
            None if p.main is None else p.inner.state[p.main].get(name, torch.zeros_like(p.main))
            for p in state.parameters
        ]
    if state.ema is not None:
        values["ema"] = state.ema.averages
    return {
        kind: list(parts_to_write(state.parameters, of_kind, PREFIXES[kind], groups.dp_cp))
        for kind, of_kind in values.items()
    }


@torch.no_grad()
def load_weights(checkpoint: Path, state: TrainState, *, prefix: str = "") -> None:
    """Read weights, and nothing else, into the main parameters, and publish them; collective.

    Raises:
        CheckpointError: The checkpoint is damaged, or of another model.
    """
    mains = [parameter.main for parameter in state.parameters]
    read_parts(checkpoint, list(parts_to_read(state.parameters, mains, prefix)))
    publish_main_parameters(state.chunks, state.optimizer)


@torch.no_grad()
def load_training_state(checkpoint: Path, state: TrainState) -> None:
    """Continue `state` from a checkpoint of any layout; collective over the world.

    Raises:
        CheckpointError: It is damaged or of another format.
    """
    record = read_checkpoint_state(checkpoint)
    load_weights(checkpoint, state)
    if record.kind == "weights":
        if state.ema is not None:
            state.ema.restart()
        return
    state.counters = record.counters
    state.losses, state.grad_norms = record.losses, record.grad_norms
    wanted: list[TensorPart] = []
    for name in MOMENTS:
        moments = [None if p.main is None else torch.empty_like(p.main) for p in state.parameters]
        for parameter, moment in zip(state.parameters, moments, strict=True):
            if parameter.main is not None:
                parameter.inner.state[parameter.main][name] = moment
        wanted += parts_to_read(state.parameters, moments, PREFIXES[name])
    if state.ema is not None and record.ema_updates is not None:
        wanted += parts_to_read(state.parameters, state.ema.averages, PREFIXES["ema"])
    read_parts(checkpoint, wanted)
    _set_optimizer_step(state, record.counters.step - record.counters.skipped_steps)
    if state.ema is None:
        return
    if record.ema_updates is None:
        state.ema.restart()
    else:
        state.ema.num_updates = record.ema_updates


def _set_optimizer_step(state: TrainState, step: int) -> None:
    """Set how many updates Adam's moments have had: torch's per tensor, fused per group."""
    for parameter in state.parameters:
        if parameter.main is not None and isinstance(parameter.inner, torch.optim.AdamW):
            parameter.inner.state[parameter.main]["step"] = torch.tensor(float(step))
    if not isinstance(state.parameters[0].inner, torch.optim.AdamW):
        for group in state.parameters[0].inner.param_groups:
            group["step"] = step
