"""Datasets at a URL (s3://, gs://, https://); whole shards are copied to a local cache.

With copies of whole shards, reads are as fast and as well checked as from a local disk. The sha256
of a copy is compared with the manifest's during the download, and the hash of a block at each read.
Samples are drawn from the whole corpus, so a run soon needs all shards. `copy_shards` copies them
before the first step, each once per node. If they do not fit into the cache, a shard is copied when
its data rows are read.

fsspec reads credentials, endpoints and proxies from the environment (AWS_PROFILE, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, FSSPEC_S3_ENDPOINT_URL, ...). A URL must not hold credentials.
"""

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from megatron_eso.data.remote.cache import ShardCache
from megatron_eso.data.remote.folder import RemoteFolder
from megatron_eso.data.shards.format import MANIFEST_FILE, TOKENIZER_FOLDER
from megatron_eso.data.shards.manifest import RESTORE, Manifest, dataset_id
from megatron_eso.errors import DataError


class RemoteShards:
    """The shards of a dataset at a URL, read from copies in a local cache.

    Attributes:
        url: URL of the dataset.
        cache: The cache of the copies.
        manifest: The manifest on the server at the start.
        directory: Local folder of the index files: the dataset without its shards.
    """

    def __init__(
        self, folder: RemoteFolder, cache: ShardCache, manifest: Manifest, directory: Path
    ) -> None:
        """Keep the parts that `connect` has made; callers use `connect`."""
        self.url = folder.url
        self.cache = cache
        self.manifest = manifest
        self.directory = directory
        self._folder = folder

    @classmethod
    def connect(cls, url: str, cache: ShardCache) -> "RemoteShards":
        """Read the manifest and copy the index files to the cache; shards are copied when needed.

        Raises:
            ConfigError: A library that the URL needs is not installed.
            DataError: There is no dataset, it cannot be read, or the cache cannot be written.
        """
        # Read the manifest; for a folder of several datasets, name them.
        folder = RemoteFolder(url)
        cache.prepare()
        try:
            manifest, encoded = folder.read_manifest()
        except DataError as error:
            parts = find_parts(folder) if isinstance(error.__cause__, FileNotFoundError) else []
            if parts:
                raise DataError(
                    f"{folder.url} holds several datasets; give {' or '.join(parts)}"
                ) from error
            raise

        # Copy the index files: hashes, documents and tokenizer.
        def fill(directory: Path) -> None:
            (directory / MANIFEST_FILE).write_bytes(encoded)
            (directory / TOKENIZER_FOLDER).mkdir()
            names = [(file.name, file) for file in (manifest.blocks, manifest.documents)]
            for file in manifest.tokenizer_files:
                if file.name in ("", ".", "..") or PurePosixPath(file.name).name != file.name:
                    raise DataError(
                        f"{folder.url}: {file.name!r} is not the name of a tokenizer's file; "
                        f"{RESTORE}"
                    )
                names.append((f"{TOKENIZER_FOLDER}/{file.name}", file))
            for name, file in names:
                with (directory / name).open("wb") as stream:
                    folder.download(name, file, stream)

        directory = cache.make_folder(dataset_id(encoded), fill)
        return cls(folder, cache, manifest, directory)

    def open(self, shard: int) -> int:
        """Open the local copy of a shard; without a copy, make it first.

        Returns:
            A file descriptor, which the caller closes.

        Raises:
            DataError: The shard cannot be copied.
        """
        handle = self.cache.open(self.manifest.shards[shard])
        if handle is None:
            handle = self.make_copy(shard)
        assert handle is not None  # because `make_copy` waits
        return handle

    def name(self, shard: int) -> str:
        """Return the URL of a shard."""
        return self._folder.name(self.manifest.shards[shard].name)

    def discard(self, shard: int) -> None:
        """Remove a local copy that cannot be read; `open` then makes another copy."""
        self.cache.remove(self.manifest.shards[shard])

    def make_copy(
        self,
        shard: int,
        *,
        wait: bool = True,
        advance: Callable[[int], None] = lambda num_bytes: None,
    ) -> int | None:
        """Make a copy of a shard in the cache and open it; see `ShardCache.make_copy`."""
        file = self.manifest.shards[shard]

        def download(stream: BinaryIO) -> None:
            self._folder.download(file.name, file, stream, advance)

        return self.cache.make_copy(file, download, wait=wait)

    def check_size(self, shard: int) -> None:
        """Compare a shard's size on the server with the manifest's.

        Raises:
            DataError: The shard is missing or has another size.
        """
        file = self.manifest.shards[shard]
        size = self._folder.size(file.name)
        if size is not None and size != file.bytes:
            raise DataError(
                f"{self.name(shard)} has {size} bytes, not the manifest's {file.bytes}; "
                "put the dataset there again"
            )


def find_parts(folder: RemoteFolder) -> list[str]:
    """Return the URLs of the datasets in a folder's `train` and `validation`."""
    parts = ("train", "validation")
    return [folder.name(part) for part in parts if folder.has(f"{part}/{MANIFEST_FILE}")]
