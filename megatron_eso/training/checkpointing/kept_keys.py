"""Compares a configuration with the checkpoint that it continues, or whose weights it starts from.

A checkpoint fixes some keys (`megatron_eso.config.keys`), which must not change. Other changes are
logged as `old -> new`.
"""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_eso.config.keys import Start
from megatron_eso.config.loading import read_config
from megatron_eso.config.origins import Origins, format_value, prefix_origin
from megatron_eso.config.sections import KEYS, Config
from megatron_eso.data.tokenizers.fingerprint import TokenizerFingerprint
from megatron_eso.errors import ConfigError
from megatron_eso.runs.checkpoint_state import STATE_FILE, read_checkpoint_state
from megatron_eso.runs.run_directory import CONFIG_FILE, RunDirectory
from megatron_eso.runs.steps import newest

INIT_FROM = "checkpoint.init_from"
MASK_TOKEN = "data.mask_token_id"

logger = logging.getLogger(__name__)


def find_checkpoint(path: Path, origins: Origins | None = None) -> Path:
    """Return `path` if it is a checkpoint, or the newest checkpoint of the run directory `path`.

    Args:
        path: Value of `checkpoint.init_from`.
        origins: Where the configuration's keys were set, for errors.

    Raises:
        ConfigError: There is none.
    """
    if (path / STATE_FILE).exists():
        return path
    found = newest(RunDirectory(path).checkpoints)
    if found is None:
        raise ConfigError(
            f"{prefix_origin(origins, INIT_FROM)}{INIT_FROM} = {path}: holds no checkpoint; name "
            f"a run directory, one of its checkpoints/step_* folders, or a sampler directory"
        )
    return found


def check_resumed(checkpoint: Path, config: Config, origins: Origins | None = None) -> None:
    """Refuse to continue a run if the configuration changes a key that its checkpoint fixes.

    Args:
        checkpoint: The checkpoint, with its configuration.
        config: The configuration to compare.
        origins: Where its keys were set, for errors.

    Raises:
        CheckpointError: The checkpoint's state cannot be read.
        ConfigError: As for `check_same`.
    """
    old = read_config(checkpoint / CONFIG_FILE)
    if read_checkpoint_state(checkpoint).kind == "training":
        remedy = "a resumed run keeps it; restore the value or choose another run.directory"
        check_same(checkpoint, old, config, "run", remedy, origins=origins)
    else:
        check_weights(checkpoint, old, config, origins=origins)


def check_initial_weights(
    checkpoint: Path,
    config: Config,
    tokenizer: TokenizerFingerprint,
    origins: Origins | None = None,
) -> None:
    """Refuse weights of another model; and of another tokenizer unless the configuration allows it.

    Args:
        checkpoint: The checkpoint of the weights, with its configuration.
        config: The configuration to compare.
        tokenizer: The tokenizer of the run's data.
        origins: Where the configuration's keys were set, for errors.

    Raises:
        CheckpointError: The checkpoint's state cannot be read.
        ConfigError: The weights do not fit; one line with key, both values and the remedy.
    """
    data = read_checkpoint_state(checkpoint).data
    theirs: Mapping[str, Any] = tokenizer.identity if data is None else data["tokenizer"]
    if theirs != tokenizer.identity and not config.checkpoint.init_other_tokenizer:
        raise ConfigError(
            f"{prefix_origin(origins, INIT_FROM)}{INIT_FROM} = {checkpoint}: these weights were "
            f"trained with another tokenizer (pieces {theirs['pieces_sha256'][:12]}, not "
            f"{tokenizer.pieces_sha256[:12]}): name shards of theirs, or set "
            f"checkpoint.init_other_tokenizer = true if their embeddings may mean other tokens"
        )
    check_initial_model(checkpoint, read_config(checkpoint / CONFIG_FILE), config, origins)


def check_initial_model(
    source: Path, old: Config, config: Config, origins: Origins | None = None
) -> None:
    """Refuse initial weights of another model; the mask token may differ with the tokenizer.

    Args:
        source: The checkpoint or the sampler directory of the weights, for errors.
        old: The configuration of the weights.
        config: The configuration to compare.
        origins: Where its keys were set, for errors.

    Raises:
        ConfigError: As for `check_same`.
    """
    ignored = (MASK_TOKEN,) if config.checkpoint.init_other_tokenizer else ()
    check_weights(source, old, config, ignored=ignored, origins=origins)


def check_weights(
    source: Path,
    old: Config,
    config: Config,
    *,
    ignored: Collection[str] = (),
    origins: Origins | None = None,
) -> None:
    """Refuse weights of another model, and log other changes of the keys that affect weights.

    Args:
        source: Where the weights are, for errors.
        old: The configuration of the weights.
        config: The configuration to compare.
        ignored: Keys that are not compared.
        origins: Where the keys of `config` were set, for errors.

    Raises:
        ConfigError: As for `check_same`.
    """
    remedy = "set that, or start from other weights"
    check_same(source, old, config, "weights", remedy, ignored=ignored, origins=origins)


def check_same(
    source: Path,
    old: Config,
    config: Config,
    start: Start,
    remedy: str,
    *,
    ignored: Collection[str] = (),
    origins: Origins | None = None,
) -> None:
    """Refuse a configuration that changes a key fixed by the checkpoint, and log other changes.

    Args:
        source: The checkpoint or the sampler directory, for errors and the log.
        old: The configuration that it holds.
        config: The configuration to compare.
        start: Whether the checkpoint's run is continued or its weights are used.
        remedy: The remedy that the error names.
        ignored: Keys that are not compared.
        origins: Where the keys of `config` were set; None: not known.

    Raises:
        ConfigError: A fixed key changes; one line with origin, key, both values and the remedy.
    """
    # Derived keys come last: the error has to name the key that a user has changed.
    for path in sorted(KEYS.keys() - set(ignored), key=lambda path: (KEYS[path].is_derived, path)):
        key, before, after = KEYS[path], old.get(path), config.get(path)
        if before == after:
            continue
        was, now = format_value(before), format_value(after)
        if key.is_frozen(start):
            raise ConfigError(
                f"{prefix_origin(origins, path)}{path} = {now}, but {source} was written with "
                f"{was}: {remedy}"
            )
        if start == "run" or key.is_logged:
            logger.info("changed since %s: %s: %s -> %s", source.name, path, was, now)
