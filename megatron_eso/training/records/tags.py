"""The tags of all curves in TensorBoard and in metrics.jsonl, and what they mean.

Scripts and dashboards rely on the tags. The table of docs/curves.md has the same lines. PHASE
is a phase of the objective: `eso_lm` has `diffusion` and `sequential`.
"""

from collections.abc import Mapping
from types import MappingProxyType

_meanings: dict[str, str] = {}


def _define(tag: str, meaning: str) -> str:
    _meanings[tag] = meaning
    return tag


LOSS = _define("train/loss", "loss of the objective, in nats per token")
NELBO = _define("train/nelbo", "NELBO of the batch: the loss with the weights of the ELBO")
_LOSS_OF_PHASE = _define(
    "train/loss_PHASE",
    "loss of a phase, divided by all tokens of its samples; the phases add up to `train/loss`",
)
GRAD_NORM = _define("train/grad_norm", "norm of the whole gradient, before clipping")
LEARNING_RATE = _define("train/learning_rate", "learning rate of the step")
DEVIATIONS = _define(
    "train/deviations", "standard deviations of loss or gradient norm above their moving means"
)
SKIPPED_STEPS = _define("train/skipped_steps", "updates skipped so far")
SPIKES = _define("train/spikes", "steps whose loss or gradient norm was flagged so far")
ROLLBACKS = _define("train/rollbacks", "times that the run went back to a checkpoint")

VAL_NELBO = _define(
    "val/nelbo", "NELBO of the validation set, in nats per token; with EMA weights if EMA is on"
)
VAL_PERPLEXITY = _define("val/perplexity", "exponential of `val/nelbo`")
VAL_NELBO_STDERR = _define("val/nelbo_stderr", "standard error of `val/nelbo`")
_VAL_NELBO_OF_PHASE = _define(
    "val/nelbo_PHASE", "part of a phase in `val/nelbo`; the phases add up"
)
_VAL_NELBO_BY_TIME = _define(
    "val/nelbo_PHASE_by_t/TIME",
    "part of a phase that has times, for each tenth of the time: `0.05` ... `0.95`",
)
_RAW = _define(
    "val_raw/...",
    "the same five values for the raw weights, if EMA and `validation.raw_weights` are on",
)

_SHARE = _define(
    "data/share/CORPUS", "share of a blend's corpus in the samples since the last record"
)

TOKENS_PER_SECOND = _define("perf/tokens_per_second", "speed of the last step")
TOKENS_PER_SECOND_PER_GPU = _define(
    "perf/tokens_per_second_per_gpu", "speed of the last step, divided by the number of ranks"
)
STEP_SECONDS = _define("perf/step_seconds", "duration of the last step")
DATA_WAIT_SECONDS = _define(
    "perf/data_wait_seconds", "time that the last step waited for data, on rank 0"
)
MFU = _define(
    "perf/mfu", "FLOPs per second, divided by the published peak of the device (GPU only)"
)
MEMORY_GIB = _define("perf/memory_gib", "peak memory of rank 0")
MEMORY_RESERVED_GIB = _define(
    "perf/memory_reserved_gib", "peak memory that torch's allocator held on rank 0 (GPU only)"
)
STRAGGLER_RANK = _define("perf/straggler_rank", "the slowest rank")
STRAGGLER_SECONDS = _define(
    "perf/straggler_seconds",
    "duration of the slowest rank's forward and backward pass, mean of the steps",
)
STRAGGLER_SPREAD = _define(
    "perf/straggler_spread", "`perf/straggler_seconds`, divided by the median of all ranks"
)
CHECKPOINT_SECONDS = _define("perf/checkpoint_seconds", "time that training waited for saves")
CHECKPOINT_WRITE_SECONDS = _define(
    "perf/checkpoint_write_seconds", "time from the start of a save to the complete checkpoint"
)
RESTARTS = _define("perf/restarts", "restarts of the run")
TIME = _define("perf/time", "seconds since 1970 at the record, in metrics.jsonl only")

TOKENS = _define("progress/tokens", "tokens so far")
FLOPS = _define("progress/flops", "floating-point operations of the objective so far")

VAL_NELBO_BY_FLOPS = _define("scaling/val_nelbo_by_flops", "`val/nelbo` with a step axis in GFLOPs")
VAL_NELBO_BY_TOKENS = _define(
    "scaling/val_nelbo_by_tokens", "`val/nelbo` with a step axis in tokens"
)

MEANINGS: Mapping[str, str] = MappingProxyType(_meanings)
"""What each tag means, in the order of the table of docs/curves.md."""


def loss_of_phase(phase: str) -> str:
    """Return the tag of a phase's training loss."""
    return _LOSS_OF_PHASE.replace("PHASE", phase)


def phase_of_loss(tag: str) -> str | None:
    """Return the phase whose training loss the tag names; None for other tags."""
    prefix = _LOSS_OF_PHASE.removesuffix("PHASE")
    return tag.removeprefix(prefix) if tag.startswith(prefix) else None


def val_nelbo_of_phase(phase: str) -> str:
    """Return the tag of a phase's part of the validation NELBO."""
    return _VAL_NELBO_OF_PHASE.replace("PHASE", phase)


def val_nelbo_by_time(phase: str, time: float) -> str:
    """Return the tag of a phase's part of the validation NELBO around a time."""
    return _VAL_NELBO_BY_TIME.replace("PHASE", phase).replace("TIME", f"{time:.2f}")


def with_raw_weights(tag: str) -> str:
    """Return the tag for the raw weights that belongs to a tag for the EMA weights."""
    return tag.replace("val/", "val_raw/", 1)


def share_of_corpus(corpus: str) -> str:
    """Return the tag of a corpus's share in the samples."""
    return _SHARE.replace("CORPUS", corpus)
