"""The datasets that the section `data` names: opening and checks."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_eso.config.sections import DataConfig, Vocabulary
from megatron_eso.data.remote.cache import ShardCache
from megatron_eso.data.remote.datasets import open_dataset
from megatron_eso.data.shards.quarantine import Quarantine
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.data.tokenizers.fingerprint import name_differences
from megatron_eso.errors import ConfigError

logger = logging.getLogger(__name__)


def open_corpus(location: str, data: DataConfig, *, check_files: bool = True) -> TokenDataset:
    """Open a dataset with the cache and the quarantine list of the configuration.

    Args:
        location: Its directory or URL.
        data: The section `data`.
        check_files: As of `TokenDataset.open`.

    Raises:
        ConfigError: A library that the URL needs is not installed.
        DataError: The dataset or the quarantine list is missing or damaged.
    """
    cache = ShardCache.at(data.cache_directory, data.cache_gib)
    return open_dataset(
        location, quarantine=read_quarantine(data), cache=cache, check_files=check_files
    )


def read_vocabulary(dataset: TokenDataset) -> Vocabulary:
    """Return the token ids of a dataset."""
    tokenizer = dataset.manifest.tokenizer
    return Vocabulary(
        size=tokenizer.vocab_size,
        mask_token_id=tokenizer.mask_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def read_quarantine(data: DataConfig) -> Quarantine:
    """Read the list that `data.quarantine` names; return an empty one where the key is left out.

    Raises:
        DataError: The list cannot be read.
    """
    return Quarantine.read(Path(data.quarantine)) if data.quarantine else Quarantine()


def warn_of_unknown(data: DataConfig, dataset_ids: Collection[str]) -> None:
    """Log the datasets of the quarantine list that do not belong to the run."""
    for unknown in sorted(read_quarantine(data).records.keys() - set(dataset_ids)):
        logger.warning("data.quarantine: no dataset of this run has the id %s", unknown)


def check_tokenizer(
    key: str, location: str, dataset: TokenDataset, expected: Mapping[str, Any]
) -> None:
    """Refuse a dataset with another tokenizer than the run's.

    Args:
        key: The key of the configuration that names the dataset.
        location: The location of the dataset in the value of `key`.
        dataset: The dataset to check.
        expected: The `identity` of the run's tokenizer.

    Raises:
        ConfigError: The tokenizers differ.
    """
    found = dataset.manifest.tokenizer.identity
    if found != expected:
        raise ConfigError(
            f"{key} = {location}: its tokenizer is not that of the run's other shards "
            f"({name_differences(expected, found)}): build all shards of a run with one tokenizer"
        )
