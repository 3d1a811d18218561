"""Checks and opens what a run needs to start; the dry run does the same."""

import copy
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from checkpoints_conversion.conversions import read_run_config
from checkpoints_conversion.sampler_directory import is_sampler_directory
from megatron_eso.config.combinations import VOCABULARY_KEYS, with_vocabulary
from megatron_eso.config.loading import LoadedConfig
from megatron_eso.config.origins import TracedConfig
from megatron_eso.config.sections import Config
from megatron_eso.data.remote.folder import RemoteFolder, is_remote
from megatron_eso.data.samples.training_data import TrainingData, open_run_data
from megatron_eso.data.samples.validation_data import ValidationData
from megatron_eso.data.shards.format import MANIFEST_FILE
from megatron_eso.data.shards.manifest import read_manifest
from megatron_eso.errors import ConfigError, OutageError, UserError
from megatron_eso.ranks import local_rank
from megatron_eso.runs.checkpoint_state import CheckpointState, read_checkpoint_state
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.steps import newest
from megatron_eso.training.checkpointing.kept_keys import (
    check_initial_model,
    check_initial_weights,
    check_resumed,
    find_checkpoint,
)

PLAN_ATTEMPTS = 2
"""Attempts of the dry run to reach remote data; the start of a run makes more."""

logger = logging.getLogger("pretrain")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The opened data of a run, and the configuration with the vocabulary of these data."""

    config: Config
    train: TrainingData
    validation: ValidationData | None


class Dataset(NamedTuple):
    """A dataset of the run: its key, its folder or URL, and which of the two it is."""

    key: str
    location: str
    is_remote: bool


def open_inputs(loaded: LoadedConfig) -> Inputs:
    """Open the data of a run, and check everything else that the start needs.

    Raises:
        ConfigError: A value is refused; one line with origin, key, value and remedy.
        DataError: Shards are missing or damaged, or have no row.
        CheckpointError: The checkpoint to start from cannot be read.
    """
    traced = TracedConfig(config=loaded.config, origins=loaded.origins)
    check_run_directory(traced)
    check_folders(traced)
    check_quarantine(traced)
    check_sequence_length(traced)
    data = traced.config.data
    # Of a thousand ranks, one on each node checks the files of the data.
    check_files = local_rank() == 0
    train, validation = open_run_data(data, traced.config.run.seed, check_files=check_files)
    check_tokenizer_files(traced, train)
    if validation is not None:
        check_validation(traced, train, validation)
    corpus = data.train_corpora[0]
    config = with_vocabulary(
        traced.config,
        vocab_size=train.vocabulary.size,
        mask_token_id=train.vocabulary.mask_token_id,
        bos_token_id=train.vocabulary.bos_token_id,
        source=corpus,
        origins=loaded.origins,
    )
    origins = {**dict.fromkeys(VOCABULARY_KEYS, corpus), **loaded.origins}
    check_first_weights(TracedConfig(config=config, origins=origins), train)
    return Inputs(config=config, train=train, validation=validation)


def list_unreachable(loaded: LoadedConfig) -> list[str]:
    """List the remote datasets that this machine cannot reach, as warnings.

    Raises:
        ConfigError: A URL cannot be read with what is installed.
        DataError: The server refuses the dataset, or it is missing or damaged.
    """
    traced = TracedConfig(config=loaded.config, origins=loaded.origins)
    unreachable = []
    for dataset in _list_datasets(traced):
        try:
            if dataset.is_remote:
                RemoteFolder(dataset.location, PLAN_ATTEMPTS).read_manifest()
        except OutageError as error:
            unreachable.append(f"{error}; the data were not checked")
    return unreachable


def check_run_directory(traced: TracedConfig) -> None:
    """Refuse a run directory that cannot be created or written to."""
    path = Path(traced.config.run.directory)
    existing = next(each for each in (path, *path.absolute().parents) if each.exists())
    key = "run.directory"
    traced.require(existing.is_dir(), key, f"{existing} is a file; name another folder")
    is_writable = os.access(existing, os.W_OK | os.X_OK)
    traced.require(is_writable, key, f"{existing} cannot be written to; name another folder")


def check_folders(traced: TracedConfig) -> None:
    """Refuse a local dataset that does not exist; suggest one in a folder below."""
    for key, location, is_elsewhere in _list_datasets(traced):
        if is_elsewhere or (Path(location) / MANIFEST_FILE).is_file():
            continue
        if not Path(location).is_dir():
            remedy = "build the shards with python -m data_tools build"
            traced.refuse(key, f"there is no folder {location}; {remedy}")
        remedy = "name a folder that data_tools build has made"
        below = sorted(path.parent for path in Path(location).glob(f"*/{MANIFEST_FILE}"))
        if below:
            wanted = key.partition(".")[2]
            below.sort(key=lambda path: path.name != wanted)
            remedy = f"name {below[0]}"
        traced.refuse(key, f"{location} holds no shards itself; {remedy}")


def check_quarantine(traced: TracedConfig) -> None:
    """Refuse a list of damaged records that does not exist."""
    name = traced.config.data.quarantine
    remedy = "there is no such file; correct the path, or leave the key out"
    traced.require(name is None or Path(name).is_file(), "data.quarantine", remedy)


def check_sequence_length(traced: TracedConfig) -> None:
    """Refuse samples that are longer than every record of a local dataset."""
    data = traced.config.data
    for key, location, is_elsewhere in _list_datasets(traced):
        if is_elsewhere:
            continue
        manifest, _ = read_manifest(Path(location))
        longest = min(manifest.record_tokens, manifest.num_tokens)
        traced.require(
            manifest.layout.num_rows(data.row_tokens) > 0,
            "data.sequence_length",
            f"{key} = {location} has no such row: its records hold {longest} tokens; use at most "
            f"{longest}, or build the shards with longer records or more text",
        )


def check_tokenizer_files(traced: TracedConfig, train: TrainingData) -> None:
    """Refuse shards without their tokenizer, which the run directory keeps a copy of."""
    folder = train.tokenizer_directory
    remedy = f"{folder} is missing; copy the tokenizer there, or build the shards again"
    traced.require(folder.is_dir(), "data.train", remedy)


def check_validation(traced: TracedConfig, train: TrainingData, validation: ValidationData) -> None:
    """Refuse validation on training data, or on more samples than the dataset has."""
    traced.require(
        validation.dataset.dataset_id not in train.datasets,
        "data.validation",
        "is training data too (data.train); name other shards, such as those of data_tools build "
        "--validation",
    )
    traced.require(
        traced.config.validation.num_samples <= validation.num_samples,
        "validation.num_samples",
        f"data.validation has {validation.num_samples} samples of data.sequence_length = "
        f"{traced.config.data.sequence_length}; use at most that, or 0 for all",
    )


def check_first_weights(traced: TracedConfig, train: TrainingData) -> None:
    """Refuse a configuration that does not fit the weights from which the run starts."""
    config, origins = traced.config, traced.origins
    checkpoint = newest(RunDirectory(Path(config.run.directory)).checkpoints)
    if checkpoint is not None:
        record = _read_resumed(checkpoint)
        if record is None:
            return
        check_resumed(checkpoint, config, origins)
        if record.data is not None:
            # A check on a copy: the run continues its data later, from an undamaged checkpoint.
            copy.copy(train).resume(
                record.data,
                consumed_samples=record.counters.consumed_samples,
                source=str(checkpoint),
                origins=origins,
            )
        return
    if config.checkpoint.init_from is None:
        return
    source = Path(config.checkpoint.init_from)
    if is_sampler_directory(source):
        check_initial_model(source, read_run_config(source), config, origins)
    else:
        check_initial_weights(find_checkpoint(source, origins), config, train.tokenizer, origins)


def _read_resumed(checkpoint: Path) -> CheckpointState | None:
    """Read the state of the newest checkpoint; None if it is damaged: the run uses an older one."""
    try:
        return read_checkpoint_state(checkpoint)
    except UserError:
        return None


def _list_datasets(traced: TracedConfig) -> list[Dataset]:
    """List the datasets that the configuration names."""
    data = traced.config.data
    named = [("data.train", corpus) for corpus in data.train_corpora]
    named += [("data.validation", data.validation)] if data.validation else []
    datasets = []
    for key, location in named:
        try:
            datasets.append(Dataset(key, location, is_remote(location)))
        except ConfigError as error:  # its text has no password of the URL
            raise ConfigError(f"{traced.find_origin(key)}: {key}: {error}") from error
    return datasets
