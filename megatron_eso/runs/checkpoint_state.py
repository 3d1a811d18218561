"""`state.json` of a checkpoint: what it holds beside its tensors."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from megatron_eso.errors import CheckpointError

STATE_FILE = "state.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Counters:
    """How far a run has come; with the parameters, all that a checkpoint needs."""

    step: int = 0
    """Steps taken, skipped ones included."""
    consumed_samples: int = 0
    """Samples taken from the training order: the whole state of the data."""
    tokens: int = 0
    """Real tokens of these samples."""
    flops: float = 0.0
    """Floating-point operations that the objective needed for them."""
    skipped_steps: int = 0
    """Steps whose update was not applied, since loss or gradient was not finite, or exploded."""
    skipped_in_row: int = 0
    """Of these, the last ones without a step between them that was applied."""
    spikes: int = 0
    """Steps whose loss or gradient norm was flagged."""
    rollbacks: int = 0
    """Times that the run went back to a checkpoint and left the samples since out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointState:
    """What a checkpoint of a training run, or of weights alone, states."""

    kind: Literal["training", "weights"]
    """Of weights, step and samples are all that is stated."""
    counters: Counters
    losses: Mapping[str, Any] = field(default_factory=dict)
    """Moving statistics of the losses: mean, variance, count."""
    grad_norms: Mapping[str, Any] = field(default_factory=dict)
    """Those of the logarithms of the gradient norms."""
    ema_updates: int | None = None
    """Updates of the moving average; None where the checkpoint holds no average."""
    torch_version: str | None = None
    val_nelbo: float | None = None
    """Of the validation at this step, if there was one."""
    noise_version: int | None = None
    """How the noise of the samples is drawn."""
    data: Mapping[str, Any] | None = None
    """The order of the samples (megatron_eso/data/samples); None in checkpoints without one."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of `state.json`."""
        content = {"format_version": FORMAT_VERSION, "kind": self.kind}
        if self.kind == "weights":
            counters = self.counters
            return content | {"step": counters.step, "consumed_samples": counters.consumed_samples}
        others = {name: getattr(self, name) for name in _AFTER_COUNTERS}
        return content | asdict(self.counters) | others


_AFTER_COUNTERS = tuple(
    each.name for each in fields(CheckpointState) if each.name not in ("kind", "counters")
)


def read_state(checkpoint: Path) -> CheckpointState:
    """Read `state.json` of a checkpoint.

    Raises:
        CheckpointError: It is missing, unreadable or of another format version.
    """
    path = checkpoint / STATE_FILE
    try:
        content = json.loads(path.read_text())
        version = content["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not readable as a checkpoint's state ({error})") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {version}, this version reads {FORMAT_VERSION}: "
            f"use the megatron-eso that wrote it"
        )
    is_training = content.get("kind") == "training"
    counters = [each.name for each in fields(Counters) if is_training or each.name in content]
    for name in ("step", "consumed_samples", *counters):
        if not isinstance(content.get(name), int | float):
            raise CheckpointError(f"{path}: {name} is no number; take another checkpoint")
    for name in ("losses", "grad_norms") if is_training else ():
        if not isinstance(content.get(name), dict):
            raise CheckpointError(f"{path}: states no {name}; take another checkpoint")
    return CheckpointState(
        kind="training" if is_training else "weights",
        counters=Counters(**{name: content[name] for name in counters}),
        **{name: content[name] for name in _AFTER_COUNTERS if name in content},
    )
