"""Sources of a dataset's shards, and a bounded set of their open files."""

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
    """A source of the shards of a dataset. Several threads may call its methods at once."""

    def open(self, shard: int) -> int:
        """Open a shard for reading; the caller closes the file descriptor.

        Raises:
            OSError: The file cannot be opened.
            DataError: A copy of the shard cannot be made.
        """

    def name(self, shard: int) -> str:
        """Return the path or URL of a shard, for messages."""

    def discard(self, shard: int) -> None:
        """Remove the copy of a shard that failed twice; `open` then makes another copy."""


class LocalShards:
    """Shards in the directory of their manifest."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """Use the shards in `directory`, which the manifest names."""
        self._directory = directory
        self._manifest = manifest

    def open(self, shard: int) -> int:
        """Open a shard for reading; the caller closes the file descriptor."""
        return os.open(self._directory / self._manifest.shards[shard].name, os.O_RDONLY)

    def name(self, shard: int) -> str:
        """Return the path of a shard."""
        return str(self._directory / self._manifest.shards[shard].name)

    def discard(self, shard: int) -> None:
        """Do nothing, because there is no other copy."""


class OpenFile:
    """A file descriptor that is closed when no reference to it remains."""

    def __init__(self, handle: int) -> None:
        """Take ownership of `handle`."""
        self.handle = handle

    def __del__(self) -> None:
        os.close(self.handle)


class OpenShards:
    """The open files of the shards read last, at most a quarter of what a process may open.

    A file that is in use stays open when it is dropped here.
    """

    def __init__(self, source: ShardSource) -> None:
        """Choose the number of open files from the limit of the process."""
        soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._capacity = max(4, min(soft_limit // 4, 4096))
        self._source = source
        self._files: OrderedDict[int, OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        self._last_drop = time.monotonic()

    def get(self, shard: int) -> OpenFile:
        """Return the open file of a shard; open it if needed."""
        with self._lock:
            file = self._files.get(shard)
            if file is not None:
                self._files.move_to_end(shard)
                return file
        # Without the lock, because the download of a remote shard takes minutes.
        file = OpenFile(self._source.open(shard))
        with self._lock:
            self._drop_removed()
            if len(self._files) >= self._capacity:
                self._files.popitem(last=False)
            return self._files.setdefault(shard, file)

    def _drop_removed(self) -> None:
        """Close files that were removed to make room; an open file still takes it."""
        now = time.monotonic()
        if now - self._last_drop > _DROP_SECONDS:
            self._last_drop = now
            for shard, file in list(self._files.items()):
                if os.fstat(file.handle).st_nlink == 0:
                    del self._files[shard]

    def forget(self, shard: int, offset: int, num_bytes: int) -> None:
        """Drop the file of a shard, which may be stale, and its bytes in the page cache."""
        with self._lock:
            file = self._files.pop(shard, None)
        if file is not None:
            with suppress(OSError):
                os.posix_fadvise(file.handle, offset, num_bytes, os.POSIX_FADV_DONTNEED)
