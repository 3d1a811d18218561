"""Datasets as `[data]` of the configuration names them."""

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


def open_corpus(location: str, data: DataConfig) -> TokenDataset:
    """Open a dataset with the cache and the quarantine list of the configuration.

    Raises:
        ConfigError: A URL that cannot be read with what is installed.
        DataError: It or the quarantine list is missing or damaged.
    """
    cache = ShardCache.at(data.cache_directory, data.cache_gib)
    return open_dataset(location, quarantine=read_quarantine(data), cache=cache)


def read_vocabulary(dataset: TokenDataset) -> Vocabulary:
    """The token ids of a dataset."""
    tokenizer = dataset.manifest.tokenizer
    return Vocabulary(size=tokenizer.vocab_size, mask_token_id=tokenizer.mask_token_id)


def read_quarantine(data: DataConfig) -> Quarantine:
    """The list that `data.quarantine` names, an empty one where it names none.

    Raises:
        DataError: It cannot be read.
    """
    return Quarantine.read(Path(data.quarantine)) if data.quarantine else Quarantine()


def warn_of_unknown(data: DataConfig, dataset_ids: Collection[str]) -> None:
    """Log the datasets of the quarantine list that a run does not have."""
    for unknown in sorted(read_quarantine(data).records.keys() - set(dataset_ids)):
        logger.warning("data.quarantine: no dataset of this run has the id %s", unknown)


def check_tokenizer(
    key: str, location: str, dataset: TokenDataset, expected: Mapping[str, Any]
) -> None:
    """Refuse a dataset whose token ids mean something else.

    Args:
        key: Names the dataset in the configuration.
        location: The value of `key`.
        dataset: To be checked.
        expected: `identity` of the run's tokenizer.

    Raises:
        ConfigError: The tokenizer is another one.
    """
    found = dataset.manifest.tokenizer.identity
    if found != expected:
        raise ConfigError(
            f"{key} = {location}: its tokenizer is not that of the run's other shards "
            f"({name_differences(expected, found)}): build all shards of a run with one tokenizer"
        )
