"""What of a training state a checkpoint holds: float32 tensors by global name, and `state.json`.

Main parameters go by the model's names, Adam's moments under
`optimizer.state.{exp_avg,exp_avg_sq}.`, the EMA under `ema.`, a tied embedding once. The weights
that a bf16 model computes with are its main parameters rounded, so they are not stored.
Megatron-Core's own optimizer format differs between its optimizers, and its distributed one cannot
be loaded into torch's Adam; this one is read by any of them on any layout.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_eso.errors import CheckpointError
from megatron_eso.training.checkpointing.files import read_pieces
from megatron_eso.training.checkpointing.pieces import Piece, pieces_to_read, pieces_to_write
from megatron_eso.training.counters import Counters, MovingStatistics
from megatron_eso.training.optimization.main_parameters import publish_main_parameters
from megatron_eso.training.optimization.optimizer import MOMENTS
from megatron_eso.training.train_state import TrainState

FORMAT_VERSION = 1
PREFIXES = {"param": "", "ema": "ema."} | {name: f"optimizer.state.{name}." for name in MOMENTS}


def describe(state: TrainState) -> dict[str, Any]:
    """What `state.json` says of a checkpoint."""
    return {
        "format_version": FORMAT_VERSION,
        "kind": "training",
        **dataclasses.asdict(state.counters),
        "losses": dataclasses.asdict(state.losses),
        "grad_norms": dataclasses.asdict(state.grad_norms),
        "ema_updates": None if state.ema is None else state.ema.num_updates,
        "torch_version": str(torch.__version__),
    }


def read_state_json(checkpoint: Path) -> dict[str, Any]:
    """Read `state.json` of a checkpoint.

    Raises:
        CheckpointError: It is missing, unreadable or of another format version.
    """
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text())
        version = state["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not readable as a checkpoint's state ({error})") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {version}, this version reads {FORMAT_VERSION}: "
            f"use the megatron-eso that wrote it"
        )
    return dict(state)


@torch.no_grad()
def list_pieces(state: TrainState, groups: ProcessGroupCollection) -> list[Piece]:
    """What this rank writes: views of the state, no copies; no communication."""
    values: dict[str, list[Tensor | None]] = {"param": [p.main for p in state.parameters]}
    for name in MOMENTS:
        values[name] = [
            None if p.main is None else p.inner.state[p.main].get(name, torch.zeros_like(p.main))
            for p in state.parameters
        ]
    if state.ema is not None:
        values["ema"] = state.ema.averages
    return [
        piece
        for kind, of_kind in values.items()
        for piece in pieces_to_write(state.parameters, of_kind, PREFIXES[kind], groups.dp_cp)
    ]


@torch.no_grad()
def load_weights(checkpoint: Path, state: TrainState, *, prefix: str = "") -> None:
    """Read weights, and nothing else, into the main parameters, and publish them; collective.

    Raises:
        CheckpointError: The checkpoint is damaged, or of another model.
    """
    mains = [parameter.main for parameter in state.parameters]
    read_pieces(checkpoint, list(pieces_to_read(state.parameters, mains, prefix)))
    publish_main_parameters(state.chunks, state.optimizer)


@torch.no_grad()
def load_training_state(checkpoint: Path, state: TrainState) -> None:
    """Continue `state` from a checkpoint of any layout; collective over the world.

    Raises:
        CheckpointError: It is damaged or of another format.
    """
    record = read_state_json(checkpoint)
    load_weights(checkpoint, state)
    if record["kind"] != "training":
        if state.ema is not None:
            state.ema.restart()
        return
    counters = Counters(**{f.name: record[f.name] for f in dataclasses.fields(Counters)})
    state.counters = counters
    state.losses = MovingStatistics(**record["losses"])
    state.grad_norms = MovingStatistics(**record["grad_norms"])
    wanted: list[Piece] = []
    for name in MOMENTS:
        moments = [None if p.main is None else torch.empty_like(p.main) for p in state.parameters]
        for parameter, moment in zip(state.parameters, moments, strict=True):
            if parameter.main is not None:
                parameter.inner.state[parameter.main][name] = moment
        wanted += pieces_to_read(state.parameters, moments, PREFIXES[name])
    if state.ema is not None and record["ema_updates"] is not None:
        wanted += pieces_to_read(state.parameters, state.ema.averages, PREFIXES["ema"])
    read_pieces(checkpoint, wanted)
    _set_optimizer_step(state, counters.step - counters.skipped_steps)
    if state.ema is None:
        return
    if record["ema_updates"] is None:
        state.ema.restart()
    else:
        state.ema.num_updates = record["ema_updates"]


def _set_optimizer_step(state: TrainState, step: int) -> None:
    """Tell Adam how many updates its moments have seen: torch's per tensor, fused per group."""
    for parameter in state.parameters:
        if parameter.main is not None and isinstance(parameter.inner, torch.optim.AdamW):
            parameter.inner.state[parameter.main]["step"] = torch.tensor(float(step))
    if not isinstance(state.parameters[0].inner, torch.optim.AdamW):
        for group in state.parameters[0].inner.param_groups:
            group["step"] = step
