"""The arguments that name a dataset by its directory or URL, and the cache for its shards."""

import argparse

from megatron_eso.command_line import positive_real
from megatron_eso.data.remote.cache import ShardCache
from megatron_eso.data.remote.datasets import existing_location


def add_location(command: argparse.ArgumentParser, *, nargs: str | None = None) -> None:
    """Add the arguments that name datasets and the cache for those behind a URL."""
    command.add_argument(
        "location",
        metavar="DIR|URL",
        type=existing_location,
        nargs=nargs,
        help="a dataset, or the folder of its train and validation splits; s3://, gs://, https://",
    )
    command.add_argument(
        "--cache-directory",
        metavar="DIR",
        help="for local copies of remote shards (default: in TMPDIR)",
    )
    command.add_argument(
        "--cache-gib",
        type=positive_real,
        default=100.0,
        metavar="N",
        help="largest total size of these copies (default: 100)",
    )


def open_cache(arguments: argparse.Namespace) -> ShardCache:
    """Open the cache that the arguments of `add_location` name."""
    return ShardCache.at(arguments.cache_directory, arguments.cache_gib)
