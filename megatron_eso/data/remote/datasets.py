"""Datasets by where they lie: a directory or a URL."""

from pathlib import Path

from megatron_eso.command_line import existing_path
from megatron_eso.data.remote.cache import ShardCache
from megatron_eso.data.remote.folder import RemoteFolder, is_remote
from megatron_eso.data.remote.shards import RemoteShards, find_parts
from megatron_eso.data.shards.checked_blocks import RETRY_SECONDS
from megatron_eso.data.shards.format import MANIFEST_FILE
from megatron_eso.data.shards.quarantine import Quarantine
from megatron_eso.data.shards.reader import TokenDataset


def open_dataset(
    location: str | Path,
    *,
    quarantine: Quarantine | None = None,
    retry_seconds: tuple[float, ...] = RETRY_SECONDS,
    cache: ShardCache | None = None,
) -> TokenDataset:
    """Open a dataset; check its manifest, its index files, and locally the size of every shard.

    Args:
        location: directory of the dataset, or its URL.
        quarantine: records whose rows are replaced by others.
        retry_seconds: pauses before further readings of what fails; empty: it fails at once.
        cache: holds local copies of what has a URL; None: one in TMPDIR.

    Raises:
        ConfigError: a URL that cannot be read with what is installed.
        DataError: there is no dataset, its version is unknown, or files are missing or damaged.
    """
    if not is_remote(location):
        return TokenDataset.open(location, quarantine=quarantine, retry_seconds=retry_seconds)
    remote = RemoteShards.connect(str(location), cache or ShardCache.at())
    return TokenDataset.open(
        remote.directory, quarantine=quarantine, retry_seconds=retry_seconds, shards=remote
    )


def existing_location(text: str) -> str:
    """A type of argument: a URL, or a path that exists."""
    return text if is_remote(text) else str(existing_path(text))


def find_datasets(location: str | Path) -> list[str]:
    """The dataset at a directory or URL, or those in its `train` and `validation`.

    Raises:
        ConfigError: a URL that cannot be read with what is installed.
        DataError: the server cannot be reached.
    """
    if is_remote(location):
        folder = RemoteFolder(str(location))
        is_dataset = folder.has(MANIFEST_FILE)
        return [str(location)] if is_dataset else find_parts(folder) or [str(location)]
    splits = [Path(location, name) for name in ("train", "validation")]
    found = [str(split) for split in splits if (split / MANIFEST_FILE).is_file()]
    return found if found and not Path(location, MANIFEST_FILE).is_file() else [str(location)]
