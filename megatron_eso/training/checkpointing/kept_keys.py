"""Compares a configuration with the checkpoint that it continues, or whose weights it starts from.

A checkpoint fixes some keys (`megatron_eso.config.keys`), which must not change. Other changes are
logged as `old -> new`.
"""

import logging
from collections.abc import Collection
from pathlib import Path

from megatron_eso.config.keys import Start
from megatron_eso.config.loading import read_config
from megatron_eso.config.origins import format_value
from megatron_eso.config.sections import KEYS, Config
from megatron_eso.data.tokenizers.fingerprint import TokenizerFingerprint
from megatron_eso.errors import ConfigError
from megatron_eso.runs.checkpoint_state import STATE_FILE, read_checkpoint_state
from megatron_eso.runs.run_directory import CONFIG_FILE, RunDirectory
from megatron_eso.runs.steps import newest

MASK_TOKEN = "data.mask_token_id"

logger = logging.getLogger(__name__)


def find_checkpoint(path: Path) -> Path:
    """Return `path` if it is a checkpoint, or the newest checkpoint of the run directory `path`.

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


def check_resumed(checkpoint: Path, config: Config) -> None:
    """Refuse to continue a run if the configuration changes a key that its checkpoint fixes.

    Raises:
        CheckpointError: The checkpoint's state cannot be read.
        ConfigError: As for `check_same`.
    """
    if read_checkpoint_state(checkpoint).kind == "training":
        remedy = "a resumed run keeps it; restore the value or choose another run.directory"
        check_same(checkpoint, config, "run", remedy)
    else:
        check_weights(checkpoint, config)


def check_initial_weights(
    checkpoint: Path, config: Config, tokenizer: TokenizerFingerprint
) -> None:
    """Refuse weights of another model; and of another tokenizer unless the configuration allows it.

    Raises:
        CheckpointError: The checkpoint's state cannot be read.
        ConfigError: The weights do not fit; one line with key, both values and the remedy.
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
    """Refuse weights of another model, and log other changes of the keys that affect weights.

    Args:
        checkpoint: The checkpoint of the weights, with its configuration.
        config: The configuration to compare.
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
    """Refuse a configuration that changes a key fixed by the checkpoint, and log other changes.

    Args:
        checkpoint: The checkpoint, with its configuration.
        config: The configuration to compare.
        start: Whether the checkpoint's run is continued or its weights are used.
        remedy: The remedy that the error names.
        ignored: Keys that are not compared.

    Raises:
        ConfigError: A fixed key changes; one line with key, both values and the remedy.
    """
    old = read_config(checkpoint / CONFIG_FILE)
    # Derived keys come last: the error has to name the key that a user has changed.
    for path in sorted(KEYS.keys() - set(ignored), key=lambda path: (KEYS[path].is_derived, path)):
        key, before, after = KEYS[path], old.get(path), config.get(path)
        if before == after:
            continue
        was, now = format_value(before), format_value(after)
        if key.is_frozen(start):
            raise ConfigError(f"{path} = {now}, but {checkpoint} was written with {was}: {remedy}")
        if start == "run" or key.is_logged:
            logger.info("changed since %s: %s: %s -> %s", checkpoint.name, path, was, now)
