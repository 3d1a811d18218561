"""Opening and finding of datasets in a directory or at a URL."""

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
    check_files: bool = True,
) -> TokenDataset:
    """Open a dataset; check its manifest, its index files, and the size of every local shard.

    Args:
        location: Directory of the dataset, or its URL.
        quarantine: Records whose data rows are replaced by others.
        retry_seconds: Pauses before a failed read is repeated; empty: it is not repeated.
        cache: Cache for the shards of a URL; None: a cache in TMPDIR.
        check_files: As of `TokenDataset.open`.

    Raises:
        ConfigError: A library that the URL needs is not installed.
        DataError: There is no dataset, its version is unknown, or files are missing or damaged.
    """
    if not is_remote(location):
        return TokenDataset.open(
            location,
            quarantine=quarantine,
            retry_seconds=retry_seconds,
            check_files=check_files,
        )
    remote = RemoteShards.connect(str(location), cache or ShardCache.at())
    return TokenDataset.open(
        remote.directory,
        quarantine=quarantine,
        retry_seconds=retry_seconds,
        shards=remote,
        check_files=check_files,
    )


def existing_location(text: str) -> str:
    """Parse an argument that is a URL or an existing path."""
    return text if is_remote(text) else str(existing_path(text))


def find_datasets(location: str | Path) -> list[str]:
    """Return the dataset at a directory or URL, or those in its `train` and `validation`.

    Raises:
        ConfigError: A library that the URL needs is not installed.
        DataError: The server cannot be reached.
    """
    if is_remote(location):
        folder = RemoteFolder(str(location))
        is_dataset = folder.has(MANIFEST_FILE)
        return [str(location)] if is_dataset else find_parts(folder) or [str(location)]
    splits = [Path(location, name) for name in ("train", "validation")]
    found = [str(split) for split in splits if (split / MANIFEST_FILE).is_file()]
    return found if found and not Path(location, MANIFEST_FILE).is_file() else [str(location)]
