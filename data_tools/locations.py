"""What a command line names: a dataset's directory or URL, or that of its two splits."""

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
        help="of a dataset, or of train and validation; s3://, gs://, https://",
    )
    command.add_argument(
        "--cache-directory",
        metavar="DIR",
        help="for copies of shards that have a URL (default: in TMPDIR)",
    )
    command.add_argument(
        "--cache-gib",
        type=positive_real,
        default=100.0,
        metavar="N",
        help="largest size of these copies together (default: 100)",
    )


def open_cache(arguments: argparse.Namespace) -> ShardCache:
    """The cache that the arguments of `add_location` name."""
    return ShardCache.at(arguments.cache_directory, arguments.cache_gib)
