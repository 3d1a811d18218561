"""What a command line names: a dataset's directory or URL, or that of its two splits."""

import argparse
from pathlib import Path

from megatron_eso.data.remote.remote_folder import is_remote
from megatron_eso.data.remote.shard_cache import ShardCache
from megatron_eso.data.remote.staging import find_remote_datasets
from megatron_eso.data.shards.shard_format import MANIFEST_FILE


def find_datasets(location: str | Path) -> list[str]:
    """The dataset at a directory or URL, or those in its `train` and `validation`.

    Raises:
        ConfigError: a URL that cannot be read with what is installed.
        DataError: the server cannot be reached.
    """
    if is_remote(location):
        return find_remote_datasets(str(location))
    splits = [Path(location, name) for name in ("train", "validation")]
    found = [str(split) for split in splits if (split / MANIFEST_FILE).is_file()]
    return found if found and not Path(location, MANIFEST_FILE).is_file() else [str(location)]


def add_location(command: argparse.ArgumentParser) -> None:
    """Add the arguments that name datasets and the cache for those behind a URL."""
    command.add_argument(
        "location",
        metavar="DIR|URL",
        help="of a dataset, or of train and validation; s3://, gs://, https://",
    )
    command.add_argument(
        "--cache-directory",
        metavar="DIR",
        help="for copies of shards that have a URL (default: in TMPDIR)",
    )
    command.add_argument(
        "--cache-gib",
        type=float,
        default=100.0,
        metavar="N",
        help="largest size of these copies together (default: 100)",
    )


def open_cache(arguments: argparse.Namespace) -> ShardCache:
    """The cache that the arguments of `add_location` name."""
    return ShardCache.at(arguments.cache_directory, arguments.cache_gib)
