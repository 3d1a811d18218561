"""Blocks of shards, each compared with its hash; what fails is read again a few times.

A read takes whole 32 KiB blocks with `pread` and compares their xxh3_64, every time: a block costs
some 3 us in the page cache, of which the hash is a tenth, so remembering which blocks were once
right would gain little and would miss damage that appears after the page was dropped.
`pread` rather than a memory map: a file that shrinks underneath is then an error with a name
instead of SIGBUS, and reading releases the interpreter lock.
"""

import errno
import logging
import os
import struct
from pathlib import Path

import xxhash

from megatron_eso.data.shards.format import BLOCK_BYTES
from megatron_eso.data.shards.sources import OpenFile, OpenShards, ShardSource
from megatron_eso.retries import retry

RETRY_SECONDS = (0.0, 0.5, 2.0, 8.0)
"""Pauses before further readings of what could not be read or did not match its hash."""
# Errors that may pass: of a disk or network, of a server that was restarted, a time-out.
_TRANSIENT = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT})

logger = logging.getLogger(__name__)


class BlockError(Exception):
    """A block that could not be read, or is not the dataset's."""

    def __init__(self, offset: int, problem: str, *, is_transient: bool = True) -> None:
        """`offset` in the shard's file; `is_transient`: another reading may succeed."""
        super().__init__(problem)
        self.offset = offset
        self.is_transient = is_transient


class CheckedBlocks:
    """The blocks of a dataset's records. Reading is safe from several threads.

    Args:
        shards: where the shards' bytes come from.
        hashes: the file of all blocks' hashes.
        retry_seconds: pauses before further readings of what fails; empty: it fails at once.
    """

    def __init__(self, shards: ShardSource, hashes: Path, retry_seconds: tuple[float, ...]) -> None:
        """Open the file of hashes; shards are opened when they are read."""
        self._shards = shards
        self._open_shards = OpenShards(shards)
        self._hashes = OpenFile(os.open(hashes, os.O_RDONLY))
        self._retry_seconds = retry_seconds

    def read(self, view: memoryview, shard: int, offset: int, first_block: int) -> None:
        """Fill `view` with blocks that lie one after the other, several times if need be.

        Args:
            view: receives whole blocks; only the last one of a record may be shorter.
            shard: number of the shard.
            offset: place of the first block in the shard's file.
            first_block: its number among the blocks of all records.

        Raises:
            BlockError: they cannot be read, or are not those of the dataset.
        """
        num_failures = 0

        def read() -> None:
            if num_failures > 0:
                self._open_shards.forget(shard, offset, len(view))
            if num_failures > 1:
                self._shards.discard(shard)
            self._read_once(view, shard, offset, first_block)

        def log(error: Exception, pause: float) -> None:
            nonlocal num_failures
            assert isinstance(error, BlockError)
            if not error.is_transient:
                raise error
            num_failures += 1
            where = f"{self._shards.name(shard)}, offset {error.offset}"
            logger.warning("%s %s; reading it again after %g s", where, error, pause)

        retry(read, errors=BlockError, pauses=self._retry_seconds, on_error=log)

    def _read_once(self, view: memoryview, shard: int, offset: int, first_block: int) -> None:
        num_blocks = -(-len(view) // BLOCK_BYTES)
        try:
            file = self._open_shards.get(shard)
            got = os.preadv(file.handle, [view], offset)
            encoded = os.pread(self._hashes.handle, 8 * num_blocks, 8 * first_block)
        except OSError as error:
            raise BlockError(
                offset,
                f"cannot be read: {error.strerror}",
                is_transient=error.errno in _TRANSIENT,
            ) from error
        if got != len(view):
            raise BlockError(offset + got, "is cut off")
        if len(encoded) != 8 * num_blocks:
            raise BlockError(offset, "has no hash: the file of hashes is cut off")
        place = 0
        for expected in struct.unpack(f"<{num_blocks}Q", encoded):
            if xxhash.xxh3_64_intdigest(view[place : place + BLOCK_BYTES]) != expected:
                raise BlockError(offset + place, "is damaged: the block's hash differs")
            place += BLOCK_BYTES
