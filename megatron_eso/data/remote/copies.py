"""Copies of all remote shards of a run, made before its first step, once on each node."""

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from megatron_eso.data.remote.cache import ShardCache
from megatron_eso.data.remote.shards import RemoteShards
from megatron_eso.data.shards.manifest import HashedFile
from megatron_eso.data.shards.sources import ShardSource
from megatron_eso.errors import ConfigError
from megatron_eso.progress import Progress
from megatron_eso.quantities import GIB, format_gib

_THREADS = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    shards: RemoteShards
    number: int

    @property
    def file(self) -> HashedFile:
        return self.shards.manifest.shards[self.number]


def copy_shards(sources: Iterable[ShardSource]) -> None:
    """Copy every remote shard of a run to its cache, or warn once that they do not fit.

    Every process calls this once with all datasets of the run; the processes of a node share the
    work. Local shards are ignored.

    Raises:
        ConfigError: The disk cannot hold the shards.
        DataError: A shard is missing on the server, or damaged.
    """
    # List each shard once, whatever number of datasets hold it.
    remotes = [source for source in sources if isinstance(source, RemoteShards)]
    if not remotes:
        return
    cache = remotes[0].cache
    jobs = {
        file.sha256: _Job(shards=remote, number=number)
        for remote in remotes
        for number, file in enumerate(remote.manifest.shards)
    }
    # Where they do not fit, check their sizes on the server now; reading copies them later.
    total = sum(job.file.bytes for job in jobs.values())
    if total > cache.max_bytes:
        logger.warning(
            "%s: the shards take %s, data.cache_gib = %.3g: each is downloaded whole when one of "
            "its data rows is read, which is slow, because samples come from all shards; raise "
            "data.cache_gib, or use a smaller dataset",
            ", ".join(remote.url for remote in remotes),
            format_gib(total),
            cache.max_bytes / GIB,
        )
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(lambda job: job.shards.check_size(job.number), jobs.values()):
                pass
        return
    _check_disk(cache, total)
    _copy_all(list(jobs.values()))


def _check_disk(cache: ShardCache, total: int) -> None:
    disk = os.statvfs(cache.directory)
    room = disk.f_bavail * disk.f_frsize + cache.allocated_bytes()
    if total > room:
        raise ConfigError(
            f"the shards take {format_gib(total)}, and {cache.directory} has room for "
            f"{format_gib(room)}; set data.cache_directory to a larger disk of this node"
        )


def _copy_all(jobs: list[_Job]) -> None:
    # Opening a copy records its use, so that other copies are removed to make room.
    missing = [job for job in jobs if not _close(job.shards.cache.open(job.file))]
    if not missing:
        return
    progress = Progress(
        "shards copied",
        sum(job.file.bytes for job in missing),
        report=lambda line: logger.info("%s", line),
    )
    with ThreadPoolExecutor(_THREADS) as pool:
        # First the shards that no other process is downloading, then the others.
        for wait in (False, True):
            done = pool.map(partial(_copy_job, progress=progress, wait=wait), missing)
            missing = [job for job, is_done in zip(missing, done, strict=True) if not is_done]
    progress.finish()


def _copy_job(job: _Job, progress: Progress, wait: bool) -> bool:
    downloaded = 0

    def advance(num_bytes: int) -> None:
        nonlocal downloaded
        downloaded += num_bytes
        progress.advance(num_bytes)

    is_done = _close(job.shards.make_copy(job.number, wait=wait, advance=advance))
    if is_done:
        progress.advance(job.file.bytes - downloaded)  # the bytes that another process downloaded
    return is_done


def _close(handle: int | None) -> bool:
    """Close a file descriptor; return whether there was one."""
    if handle is not None:
        os.close(handle)
    return handle is not None
