"""Datasets behind a URL: s3://, gs:// and https:// by fsspec, whole shards copied to a local cache.

Copying whole shards makes reading as fast and as checked as from a local disk: the sha256 of every
copy is compared with the manifest's while it is downloaded, and the hash of every block whenever it
is read. Samples are drawn from the whole corpus, so a run needs all shards soon: `stage_shards`
fetches them before the first step, each once per node. Where they do not fit into the cache they
are fetched as rows ask for them.

Credentials, endpoints and proxies are fsspec's business (AWS_PROFILE, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, FSSPEC_S3_ENDPOINT_URL, ...); a URL must not hold any.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from megatron_eso.data.remote.remote_folder import RemoteFolder
from megatron_eso.data.remote.shard_cache import ShardCache
from megatron_eso.data.shards.manifest import HashedFile, Manifest, dataset_id
from megatron_eso.data.shards.shard_files import ShardSource
from megatron_eso.data.shards.shard_format import MANIFEST_FILE, TOKENIZER_FOLDER
from megatron_eso.errors import ConfigError, DataError
from megatron_eso.files import sync_tree

_THREADS = 8
_REPORT_SECONDS = 10.0

logger = logging.getLogger(__name__)


class RemoteShards:
    """The shards of a dataset behind a URL, read from copies in a local cache.

    Attributes:
        url: of the dataset.
        cache: where the copies are.
        manifest: as the server has it now.
        directory: local folder of the index files: the dataset without its shards.
    """

    def __init__(
        self, folder: RemoteFolder, cache: ShardCache, manifest: Manifest, directory: Path
    ) -> None:
        """Use `connect` instead."""
        self.url = folder.url
        self.cache = cache
        self.manifest = manifest
        self.directory = directory
        self._folder = folder

    @classmethod
    def connect(cls, url: str, cache: ShardCache) -> "RemoteShards":
        """Read the manifest and have the index files in the cache; shards come when asked for.

        Raises:
            ConfigError: the library for such URLs is not installed.
            DataError: there is no dataset, or it cannot be read; or the cache cannot be written.
        """
        folder = RemoteFolder(url)
        cache.prepare()
        try:
            manifest, encoded = folder.read_manifest()
        except DataError as error:
            parts = _find_parts(folder) if isinstance(error.__cause__, FileNotFoundError) else []
            if parts:
                raise DataError(
                    f"{folder.url} holds several datasets; give {' or '.join(parts)}"
                ) from error
            raise

        def fill(directory: Path) -> None:
            (directory / MANIFEST_FILE).write_bytes(encoded)
            (directory / TOKENIZER_FOLDER).mkdir()
            names = [(file.name, file) for file in (manifest.blocks, manifest.documents)]
            for file in manifest.tokenizer_files:
                if file.name in ("", ".", "..") or PurePosixPath(file.name).name != file.name:
                    raise DataError(f"{folder.url}: {file.name!r} is no name of a tokenizer's file")
                names.append((f"{TOKENIZER_FOLDER}/{file.name}", file))
            for name, file in names:
                with (directory / name).open("wb") as stream:
                    folder.download(name, file, stream)
            sync_tree(directory)

        directory = cache.make_folder(dataset_id(encoded), fill)
        return cls(folder, cache, manifest, directory)

    def open(self, shard: int) -> int:
        """Open the local copy of a shard, staging it first where there is none.

        Returns:
            A descriptor, which the caller closes.

        Raises:
            DataError: the shard cannot be had.
        """
        handle = self.cache.open(self.manifest.shards[shard])
        if handle is None:
            handle = self.stage(shard)
        assert handle is not None  # since `stage` waits
        return handle

    def name(self, shard: int) -> str:
        """The URL of a shard."""
        return self._folder.name(self.manifest.shards[shard].name)

    def discard(self, shard: int) -> None:
        """Remove the local copy of a shard, which does not read well; `open` makes another."""
        self.cache.remove(self.manifest.shards[shard])

    def stage(
        self,
        shard: int,
        *,
        wait: bool = True,
        advance: Callable[[int], None] = lambda num_bytes: None,
    ) -> int | None:
        """Have a copy of a shard in the cache and open it; see `ShardCache.stage`."""
        file = self.manifest.shards[shard]

        def download(stream: BinaryIO) -> None:
            self._folder.download(file.name, file, stream, advance)

        return self.cache.stage(file, download, wait=wait)

    def check_size(self, shard: int) -> None:
        """Compare a shard's size on the server with the manifest's.

        Raises:
            DataError: it is missing or of another size.
        """
        file = self.manifest.shards[shard]
        size = self._folder.size(file.name)
        if size is not None and size != file.bytes:
            raise DataError(
                f"{self.name(shard)} has {size} bytes, not the manifest's {file.bytes}; "
                "put the dataset there again"
            )


def find_remote_datasets(url: str) -> list[str]:
    """The dataset at a URL, or those in its `train` and `validation`."""
    folder = RemoteFolder(url)
    return [url] if folder.has(MANIFEST_FILE) else _find_parts(folder) or [url]


def _find_parts(folder: RemoteFolder) -> list[str]:
    parts = ("train", "validation")
    return [folder.name(part) for part in parts if folder.has(f"{part}/{MANIFEST_FILE}")]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    shards: RemoteShards
    number: int

    @property
    def file(self) -> HashedFile:
        return self.shards.manifest.shards[self.number]


def stage_shards(sources: Iterable[ShardSource]) -> None:
    """Have every remote shard of a run in its cache, or say once that they do not fit.

    To be called once with all datasets of the run, by every process: those of a node share the
    work. Local shards need nothing.

    Raises:
        ConfigError: the disk cannot hold what the cache is allowed.
        DataError: a shard is missing on the server, or damaged.
    """
    remotes = [source for source in sources if isinstance(source, RemoteShards)]
    if not remotes:
        return
    cache = remotes[0].cache
    jobs = {
        file.sha256: _Job(shards=remote, number=number)
        for remote in remotes
        for number, file in enumerate(remote.manifest.shards)
    }
    total = sum(job.file.bytes for job in jobs.values())
    if total > cache.max_bytes:
        logger.warning(
            "%s: the shards take %.3g GiB, data.cache_gib = %.3g: each is downloaded whole when a "
            "row asks for it, which is slow, as samples come from all of them; raise "
            "data.cache_gib, or use a smaller dataset",
            ", ".join(remote.url for remote in remotes),
            total / 2**30,
            cache.max_bytes / 2**30,
        )
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(lambda job: job.shards.check_size(job.number), jobs.values()):
                pass
        return
    _check_disk(cache, total)
    _stage_all(list(jobs.values()))


def _check_disk(cache: ShardCache, total: int) -> None:
    disk = os.statvfs(cache.directory)
    room = disk.f_bavail * disk.f_frsize + cache.allocated_bytes()
    if total > room:
        raise ConfigError(
            f"the shards take {total / 2**30:.3g} GiB, and {cache.directory} has room for "
            f"{room / 2**30:.3g} GiB; set data.cache_directory to a larger disk of this node"
        )


def _stage_all(jobs: list[_Job]) -> None:
    # What is there first counts as used, so that making room for the rest takes others' shards.
    missing = [job for job in jobs if not _close(job.shards.cache.open(job.file))]
    if not missing:
        return
    progress = _Progress(sum(job.file.bytes for job in missing))
    with ThreadPoolExecutor(_THREADS) as pool:
        # First what nobody is at, then what other processes were at.
        for wait in (False, True):
            done = pool.map(partial(_stage_job, progress=progress, wait=wait), missing)
            missing = [job for job, is_done in zip(missing, done, strict=True) if not is_done]
    progress.finish()


def _stage_job(job: _Job, progress: "_Progress", wait: bool) -> bool:
    downloaded = 0

    def advance(num_bytes: int) -> None:
        nonlocal downloaded
        downloaded += num_bytes
        progress.advance(num_bytes)

    is_done = _close(job.shards.stage(job.number, wait=wait, advance=advance))
    if is_done:
        progress.advance(job.file.bytes - downloaded)  # what another process has downloaded
    return is_done


def _close(handle: int | None) -> bool:
    """Close a handle; returns whether there was one."""
    if handle is not None:
        os.close(handle)
    return handle is not None


class _Progress:
    """Logs now and then how much of the shards is there."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._start = self._last = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, num_bytes: int) -> None:
        """Count bytes."""
        with self._lock:
            self._done += num_bytes
            now = time.monotonic()
            if now - self._last < _REPORT_SECONDS:
                return
            self._last = now
            rate = self._done / (now - self._start)
            left = (self._total - self._done) / max(rate, 1.0)
            logger.info(
                "staging shards: %.0f %% of %.1f MB, %.1f MB/s, %.0f s left",
                100 * self._done / self._total,
                self._total / 1e6,
                rate / 1e6,
                left,
            )

    def finish(self) -> None:
        """Log the end."""
        logger.info(
            "staged %.1f MB of shards in %.1f s", self._total / 1e6, time.monotonic() - self._start
        )
