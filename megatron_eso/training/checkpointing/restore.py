"""How a run starts: from its own newest checkpoint, from the weights of another, or fresh.

What a checkpoint fixes may not change; what may is logged, old -> new.
"""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_eso.config.keys import Start
from megatron_eso.config.loading import read_config
from megatron_eso.config.sections import KEYS, Config
from megatron_eso.data.tokenizers.fingerprint import TokenizerFingerprint
from megatron_eso.errors import CheckpointError, ConfigError
from megatron_eso.runs.checkpoint_state import STATE_FILE, read_checkpoint_state
from megatron_eso.runs.run_directory import CONFIG_FILE, RunDirectory
from megatron_eso.runs.steps import newest
from megatron_eso.training.checkpointing.checkpoints import Checkpoints
from megatron_eso.training.checkpointing.files import find_damaged_files
from megatron_eso.training.checkpointing.state import load_training_state, load_weights
from megatron_eso.training.steps.train_state import TrainState

MASK_TOKEN = "data.mask_token_id"

logger = logging.getLogger(__name__)


def restore(
    state: TrainState, config: Config, checkpoints: Checkpoints, *, init_from: Path | None = None
) -> None:
    """Continue from the run's newest checkpoint, or start as configured; collective over the world.

    Args:
        state: Fresh, filled in place.
        config: The run's.
        checkpoints: The run's.
        init_from: Where the weights of a new run come from; by default `checkpoint.init_from`.

    Raises:
        CheckpointError: The checkpoint is damaged or of another format.
        ConfigError: It is of another model, seed or data than the configuration.
    """
    valid = checkpoints.find_valid()
    if valid is not None:
        resume(valid, state, config, checkpoints)
    elif config.checkpoint.init_from is not None:
        source = find_checkpoint(init_from or Path(config.checkpoint.init_from))
        start_from(source, state, config, checkpoints.batches.data.tokenizer)
    else:
        logger.info("starting from fresh weights, seed %d", config.run.seed)


def resume(checkpoint: Path, state: TrainState, config: Config, checkpoints: Checkpoints) -> None:
    """Continue a run; collective over the world, errors as for `restore`."""
    record = read_checkpoint_state(checkpoint)
    is_training = record.kind == "training"
    if is_training:
        remedy = "a resumed run keeps it; restore the value or choose another run.directory"
        check_same(checkpoint, config, "run", remedy)
        checkpoints.batches.resume(record, str(checkpoint))
    else:
        check_weights(checkpoint, config)
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
    """Start a new run from weights; collective over the world, errors as for `restore`."""
    refuse_damage(source)
    check_initial_weights(source, config, tokenizer)
    load_weights(source, state)
    if state.ema is not None:
        state.ema.restart()
    record = read_checkpoint_state(source)
    logger.info(
        "starting from %s: loaded are its weights of step %d%s; fresh are Adam's moments, %sthe "
        "learning-rate schedule, the counters and the order of the samples",
        source,
        record.counters.step,
        "" if record.ema_updates is None else " (not their moving average)",
        "" if state.ema is None else "the moving average (it starts at these weights), ",
    )


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` names: itself, or the newest of a run directory.

    Raises:
        ConfigError: There is none.
    """
    if (path / STATE_FILE).exists():
        return path
    found = newest(RunDirectory(path).checkpoints)
    if found is None:
        raise ConfigError(
            f"checkpoint.init_from = {path}: holds no checkpoint; name a run directory, one of its "
            f"checkpoints/step_* folders, or a sampler directory"
        )
    return found


def refuse_damage(checkpoint: Path) -> None:
    """Refuse a checkpoint whose files are not those of its index; collective over the world.

    Raises:
        CheckpointError: Names the first damaged file.
    """
    problems = find_damaged_files(checkpoint)
    if problems:
        raise CheckpointError(f"{problems[0]}; take another checkpoint than {checkpoint}")


def check_initial_weights(
    checkpoint: Path, config: Config, tokenizer: TokenizerFingerprint
) -> None:
    """Refuse weights of another model, or of another tokenizer unless that is deliberate.

    Raises:
        CheckpointError: The checkpoint's state cannot be read.
        ConfigError: One line with key, both values and the remedy.
    """
    if config.checkpoint.init_other_tokenizer:
        check_weights(checkpoint, config, ignored=(MASK_TOKEN,))
        return
    data = read_checkpoint_state(checkpoint).data
    if data is not None and data["tokenizer"] != tokenizer.identity:
        raise ConfigError(
            f"checkpoint.init_from = {checkpoint}: these weights were trained with another "
            f"tokenizer (pieces {data['tokenizer']['pieces_sha256'][:12]}, not "
            f"{tokenizer.pieces_sha256[:12]}): name shards of theirs, or set "
            f"checkpoint.init_other_tokenizer = true if their embeddings may mean other tokens"
        )
    check_weights(checkpoint, config)


def check_weights(checkpoint: Path, config: Config, *, ignored: Collection[str] = ()) -> None:
    """Refuse weights of another model, and log what else of what shaped them changes.

    Args:
        checkpoint: Holds the configuration that it was written with.
        config: To compare with it.
        ignored: Keys that are not compared.

    Raises:
        ConfigError: As for `check_same`.
    """
    remedy = "set that, or start from other weights"
    check_same(checkpoint, config, "weights", remedy, ignored=ignored)


def check_same(
    checkpoint: Path,
    config: Config,
    start: Start,
    remedy: str,
    *,
    ignored: Collection[str] = (),
) -> None:
    """Refuse a configuration that changes what a checkpoint fixes, and log what else it changes.

    What is fixed, and what is logged, stands with each key (`megatron_eso.config.keys`).

    Args:
        checkpoint: Holds the configuration that it was written with.
        config: To compare with it.
        start: What the checkpoint is read for.
        remedy: For the error.
        ignored: Keys that are not compared.

    Raises:
        ConfigError: One line with key, both values and the remedy.
    """
    old = read_config(checkpoint / CONFIG_FILE)
    for path in sorted(KEYS.keys() - set(ignored)):
        key, before, after = KEYS[path], _as_toml(old.get(path)), _as_toml(config.get(path))
        if before == after:
            continue
        if key.is_frozen(start):
            raise ConfigError(
                f"{path} = {after!r}, but {checkpoint} was written with {before!r}: {remedy}"
            )
        if start == "run" or key.is_logged:
            logger.info("changed since %s: %s: %r -> %r", checkpoint.name, path, before, after)


def _as_toml(value: Any) -> Any:
    """The value with a list where the configuration holds a tuple."""
    return list(value) if isinstance(value, tuple) else value
