"""Local copies of remote shards: one folder, bounded in size, shared by the processes of a node.

    shards/SHA256          a whole shard; its modification time is its last use
    shards/SHA256.*.tmp    a shard that the holder of locks/SHA256 is writing
    datasets/ID            index files of a dataset: manifest, block hashes, documents, tokenizer
    locks/                 empty files for flock: one per hash, and `cache` for adding and removing

Names are hashes of the content. Shards of two corpora with equal names therefore do not mix, and a
shard that two corpora share is kept once. A file gets its name when it is complete and on disk. The
kernel frees the locks of a killed process, so no other process waits for it. A temporary file whose
lock is free is removed. Processes that have a shard open can still read it after its removal.

The index files (0.013 % of a corpus) do not count towards the bound and are kept.
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_eso.data.shards.manifest import HashedFile
from megatron_eso.errors import ConfigError, DataError
from megatron_eso.files import new_folder, new_path
from megatron_eso.locks import Lock, hold_lock
from megatron_eso.quantities import GIB

_TEMPORARY = ".tmp"
_POLL_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardCache:
    """A cache in a folder, for several threads and processes at once."""

    directory: Path
    """Folder of the cache, on a disk of this node that supports flock."""
    max_bytes: int
    """Largest total size of the shards, including those being written."""

    @classmethod
    def at(cls, directory: str | None = None, gib: float = 100.0) -> "ShardCache":
        """Return the cache that the configuration or a command line names.

        Args:
            directory: Folder of the cache. None: `megatron-eso-cache-UID` in TMPDIR, which is a
                local disk on clusters, whereas home directories are shared and small.
            gib: Largest total size of the shards in GiB.

        Raises:
            ConfigError: `gib` is not positive.
        """
        if not gib > 0:
            raise ConfigError(f"data.cache_gib = {gib}: give a size above 0, in GiB")
        default = Path(tempfile.gettempdir(), f"megatron-eso-cache-{os.getuid()}")
        folder = Path(directory).expanduser() if directory else default
        return cls(directory=folder.absolute(), max_bytes=int(gib * GIB))

    @property
    def shards(self) -> Path:
        """Folder of the shards."""
        return self.directory / "shards"

    @property
    def datasets(self) -> Path:
        """Folder of the datasets' index files."""
        return self.directory / "datasets"

    def prepare(self) -> None:
        """Make the folders, and remove the temporary files of killed processes.

        Raises:
            DataError: The folder cannot be written.
        """
        with self._explaining_errors():
            for folder in (self.directory, self.shards, self.datasets, self._locks):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._remove_garbage()

    def open(self, file: HashedFile) -> int | None:
        """Open the copy of a shard, and record this as its last use.

        Returns:
            A file descriptor, which the caller closes; None without a copy.
        """
        try:
            handle = os.open(self._path(file), os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(handle).st_size == file.bytes:
            os.utime(handle)
            return handle
        os.close(handle)
        return None

    def remove(self, file: HashedFile) -> None:
        """Remove the copy of a shard that is damaged."""
        self._path(file).unlink(missing_ok=True)

    def make_copy(
        self, file: HashedFile, download: Callable[[BinaryIO], None], *, wait: bool = True
    ) -> int | None:
        """Open the copy of a shard; without a copy, one of the processes that call this makes it.

        Args:
            file: The shard.
            download: Writes exactly the content of the shard, or raises.
            wait: Whether to wait for another process that is downloading the shard.

        Returns:
            A file descriptor, which the caller closes. It stays valid even if the copy is removed
            to make room. None if another process is downloading the shard and `wait` is off.

        Raises:
            ConfigError: The shard is larger than the cache.
            DataError: The folder cannot be written.
        """
        if file.bytes > self.max_bytes:
            raise ConfigError(
                f"data.cache_gib = {self.max_bytes / GIB:.3g} is less than the {file.bytes} bytes "
                f"of the shard {file.name}; raise it"
            )
        with self._explaining_errors(), self.lock(file.sha256, wait=wait) as lock:
            if not lock.is_held:
                return None
            handle = self.open(file)
            if handle is None:
                with new_path(self._path(file), self._reserve(file)) as temporary:
                    with temporary.open("r+b") as stream:
                        download(stream)
                    # Open it before it has its name: another process may remove it afterwards.
                    handle = os.open(temporary, os.O_RDONLY)
            return handle

    def make_folder(self, name: str, fill: Callable[[Path], None]) -> Path:
        """Return the folder of a dataset; one of the processes that call this makes it.

        Args:
            name: The dataset id.
            fill: Writes the files into an empty folder.

        Returns:
            The complete folder.

        Raises:
            DataError: The folder cannot be written.
        """
        folder = self.datasets / name
        with self._explaining_errors(), self.lock(name):
            if not folder.is_dir():
                self._remove_garbage_of(self.datasets, name)
                building = self.datasets / f"{name}.building{_TEMPORARY}"
                with new_folder(folder, building=building) as unfinished:
                    fill(unfinished)
        return folder

    def lock(self, name: str, *, wait: bool = True) -> AbstractContextManager[Lock]:
        """Return a lock between all threads and processes; see `hold_lock`."""
        return hold_lock(self._locks / name, wait=wait)

    def allocated_bytes(self) -> int:
        """Return the bytes of the disk that the shards take now."""
        return sum(status.st_blocks * 512 for _, status in self._list_shards())

    @property
    def _locks(self) -> Path:
        return self.directory / "locks"

    def _path(self, file: HashedFile) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", file.sha256):
            raise DataError(f"{file.name}: {file.sha256!r} is not a sha256; build the shards again")
        return self.shards / file.sha256

    def _reserve(self, file: HashedFile) -> Path:
        """Make room, and reserve it by a temporary file; the caller holds the shard's lock."""
        self._remove_garbage_of(self.shards, file.sha256)
        while True:
            with self.lock("cache"):
                self._remove_garbage()
                entries = sorted(self._list_shards(), key=lambda entry: entry[1].st_mtime_ns)
                free = self.max_bytes - sum(status.st_size for _, status in entries)
                for path, status in entries:
                    if free < file.bytes and path.suffix != _TEMPORARY:
                        path.unlink(missing_ok=True)
                        free += status.st_size
                if free >= file.bytes:
                    descriptor, temporary = tempfile.mkstemp(
                        dir=self.shards, prefix=f"{file.sha256}.", suffix=_TEMPORARY
                    )
                    os.truncate(descriptor, file.bytes)
                    os.close(descriptor)
                    return Path(temporary)
            # Wait: the downloads of other processes take all the room.
            time.sleep(_POLL_SECONDS)

    def _list_shards(self) -> list[tuple[Path, os.stat_result]]:
        entries = []
        for path in self.shards.iterdir():
            with suppress(FileNotFoundError):  # renamed or removed meanwhile
                entries.append((path, path.stat()))
        return entries

    def _remove_garbage(self) -> None:
        for folder in (self.shards, self.datasets):
            for name in {path.name.partition(".")[0] for path in folder.glob(f"*{_TEMPORARY}")}:
                with self.lock(name, wait=False) as lock:
                    if lock.is_held:
                        self._remove_garbage_of(folder, name)

    def _remove_garbage_of(self, folder: Path, name: str) -> None:
        """Remove the temporary files of a killed writer; the caller holds the lock of the name."""
        for path in folder.glob(f"{name}.*{_TEMPORARY}"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    @contextmanager
    def _explaining_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"cannot keep shards in {self.directory}: {error.strerror or error}; give "
                "data.cache_directory a folder on a disk of this node that holds data.cache_gib"
            ) from error
