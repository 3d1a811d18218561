"""Starts a run: from its newest checkpoint, from other weights, or from fresh ones."""

import logging
from pathlib import Path

from megatron_eso.config.sections import Config
from megatron_eso.data.tokenizers.fingerprint import TokenizerFingerprint
from megatron_eso.errors import CheckpointError
from megatron_eso.runs.checkpoint_state import read_checkpoint_state
from megatron_eso.training.checkpointing.checkpoints import Checkpoints
from megatron_eso.training.checkpointing.files import find_damaged_files
from megatron_eso.training.checkpointing.kept_keys import (
    check_initial_weights,
    check_resumed,
    find_checkpoint,
)
from megatron_eso.training.checkpointing.state import load_training_state, load_weights
from megatron_eso.training.steps.train_state import TrainState, draw_weights

logger = logging.getLogger(__name__)


def restore(
    state: TrainState, config: Config, checkpoints: Checkpoints, *, init_from: Path | None = None
) -> None:
    """Continue from the run's newest checkpoint, or start as configured; collective over the world.

    Args:
        state: A state whose weights need no values; changed in place.
        config: The run's configuration.
        checkpoints: The run's checkpoints.
        init_from: The checkpoint whose weights a new run starts from; by default
            `checkpoint.init_from`.

    Raises:
        CheckpointError: The checkpoint is damaged or has another format.
        ConfigError: The checkpoint has another model, seed or data than the configuration.
    """
    valid = checkpoints.find_valid()
    if valid is not None:
        resume(valid, state, config, checkpoints)
    elif config.checkpoint.init_from is not None:
        source = find_checkpoint(init_from or Path(config.checkpoint.init_from))
        start_from(source, state, config, checkpoints.batches.data.tokenizer)
    else:
        draw_weights(state, config)
        logger.info("starting from fresh weights, seed %d", config.run.seed)


def resume(checkpoint: Path, state: TrainState, config: Config, checkpoints: Checkpoints) -> None:
    """Continue a run from a checkpoint; collective over the world, errors as for `restore`."""
    record = read_checkpoint_state(checkpoint)
    is_training = record.kind == "training"
    check_resumed(checkpoint, config)
    if is_training:
        checkpoints.batches.resume(record, str(checkpoint))
    load_training_state(checkpoint, state)
    state.scheduler.step(state.counters.step)
    has_average = record.ema_updates is not None
    average = "moving average" if has_average else "a FRESH moving average, it has none"
    if state.ema is None:
        average = "its moving average LEFT OUT" if has_average else "no moving average"
    logger.info(
        "resuming from %s, step %d, sample %d: weights, %s, %s; learning rate and schedule as "
        "configured now",
        checkpoint,
        state.counters.step,
        state.counters.consumed_samples,
        "Adam's moments, counters" if is_training else "FRESH moments and counters, it has none",
        average,
    )


def start_from(
    source: Path, state: TrainState, config: Config, tokenizer: TokenizerFingerprint
) -> None:
    """Start a run from given weights; collective over the world, errors as for `restore`."""
    refuse_damage(source)
    check_initial_weights(source, config, tokenizer)
    load_weights(source, state)
    state.init_version = None
    if state.ema is not None:
        state.ema.restart()
    record = read_checkpoint_state(source)
    logger.info(
        "starting from %s: read the weights of step %d%s; Adam's moments, %sthe learning-rate "
        "schedule, the counters and the order of the samples start fresh",
        source,
        record.counters.step,
        "" if record.ema_updates is None else " (not their moving average)",
        "" if state.ema is None else "the moving average (it starts at these weights), ",
    )


def refuse_damage(checkpoint: Path) -> None:
    """Refuse a checkpoint whose files differ from its index of hashes; collective over the world.

    Raises:
        CheckpointError: A file is damaged; the message names the first one.
    """
    problems = find_damaged_files(checkpoint)
    if problems:
        raise CheckpointError(f"{problems[0]}; take another checkpoint than {checkpoint}")
