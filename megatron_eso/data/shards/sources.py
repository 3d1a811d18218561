"""Where a dataset's shards come from, and their open handles: as many as a process may hold."""

import os
import resource
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from megatron_eso.data.shards.manifest import Manifest

_DROP_SECONDS = 1.0


class ShardSource(Protocol):
    """The shards of a dataset. Its methods may be called from several threads."""

    def open(self, shard: int) -> int:
        """A file descriptor of a shard, open for reading; the caller closes it.

        Raises:
            OSError: the file cannot be opened.
            DataError: a copy of it cannot be made.
        """

    def name(self, shard: int) -> str:
        """Path or URL of a shard, for messages."""

    def discard(self, shard: int) -> None:
        """Remove the copy of a shard that failed twice, so that `open` makes another."""


class LocalShards:
    """Shards in the directory of their manifest."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """`directory` of the dataset."""
        self._directory = directory
        self._manifest = manifest

    def open(self, shard: int) -> int:
        """A file descriptor of a shard, open for reading; the caller closes it."""
        return os.open(self._directory / self._manifest.shards[shard].name, os.O_RDONLY)

    def name(self, shard: int) -> str:
        """Path of a shard."""
        return str(self._directory / self._manifest.shards[shard].name)

    def discard(self, shard: int) -> None:
        """Do nothing: there is no other copy."""


class OpenFile:
    """A file descriptor that is closed when the last reference to it is gone."""

    def __init__(self, handle: int) -> None:
        """Take over `handle`."""
        self.handle = handle

    def __del__(self) -> None:
        os.close(self.handle)


class OpenShards:
    """Handles of the shards read last, no more than a quarter of what the process may hold.

    A handle in use stays open when it is dropped here.
    """

    def __init__(self, source: ShardSource) -> None:
        """Nothing is opened yet."""
        soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._capacity = max(4, min(soft_limit // 4, 4096))
        self._source = source
        self._files: OrderedDict[int, OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        self._last_drop = time.monotonic()

    def get(self, shard: int) -> OpenFile:
        """The open file of a shard."""
        with self._lock:
            file = self._files.get(shard)
            if file is not None:
                self._files.move_to_end(shard)
                return file
        # Not under the lock: a remote shard takes minutes to come.
        file = OpenFile(self._source.open(shard))
        with self._lock:
            self._drop_removed()
            if len(self._files) >= self._capacity:
                self._files.popitem(last=False)
            return self._files.setdefault(shard, file)

    def _drop_removed(self) -> None:
        """Close files that were removed to make room: they take it as long as they are open."""
        now = time.monotonic()
        if now - self._last_drop > _DROP_SECONDS:
            self._last_drop = now
            for shard, file in list(self._files.items()):
                if os.fstat(file.handle).st_nlink == 0:
                    del self._files[shard]

    def forget(self, shard: int, offset: int, num_bytes: int) -> None:
        """Drop a shard's handle, which may be stale, and what memory holds of its bytes."""
        with self._lock:
            file = self._files.pop(shard, None)
        if file is not None:
            with suppress(OSError):
                os.posix_fadvise(file.handle, offset, num_bytes, os.POSIX_FADV_DONTNEED)
