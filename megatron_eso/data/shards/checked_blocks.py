"""Reading of blocks of shards; each block is compared with its hash, and failed reads are retried.

Every read takes whole 32 KiB blocks with `pread` and compares their xxh3_64. A block takes about
3 us from the page cache, and its hash a tenth of that. A list of blocks that were once correct
would save little, and would miss damage that appears after the page was dropped.

`pread` is used instead of a memory map: a file that becomes shorter is then a named error and not
SIGBUS, and a read releases the interpreter lock.
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
"""Pauses before the retries of a block that cannot be read or does not match its hash."""
# Errors that may pass: of a disk or network, a restarted server, a time-out.
_TRANSIENT = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT})

logger = logging.getLogger(__name__)


class BlockError(Exception):
    """A block cannot be read, or does not match its hash."""

    def __init__(self, offset: int, problem: str, *, is_transient: bool = True) -> None:
        """Keep where the block is, and whether a retry may succeed.

        Args:
            offset: Offset of the block in the shard's file.
            problem: What is wrong, for the error.
            is_transient: Whether another read may succeed.
        """
        super().__init__(problem)
        self.offset = offset
        self.is_transient = is_transient


class CheckedBlocks:
    """The blocks of a dataset's records. Several threads may read them at once.

    Args:
        shards: Source of the shards.
        hashes: The file with the hashes of all blocks.
        retry_seconds: Pauses before a failed read is repeated; empty: it is not repeated.
    """

    def __init__(self, shards: ShardSource, hashes: Path, retry_seconds: tuple[float, ...]) -> None:
        """Open the file of hashes; a shard is opened when it is read."""
        self._shards = shards
        self._open_shards = OpenShards(shards)
        self._hashes = OpenFile(os.open(hashes, os.O_RDONLY))
        self._retry_seconds = retry_seconds

    def read(self, view: memoryview, shard: int, offset: int, first_block: int) -> None:
        """Fill `view` with consecutive blocks; retry where that fails.

        The second attempt opens the shard again, and the third one makes a new copy of a remote
        shard.

        Args:
            view: Receives whole blocks; only the last one of a record may be shorter.
            shard: Number of the shard.
            offset: Offset of the first block in the shard's file.
            first_block: Number of the first block among the blocks of all records.

        Raises:
            BlockError: The blocks cannot be read, or do not match their hashes.
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
        start = 0
        for expected in struct.unpack(f"<{num_blocks}Q", encoded):
            if xxhash.xxh3_64_intdigest(view[start : start + BLOCK_BYTES]) != expected:
                raise BlockError(offset + start, "is damaged: the block's hash differs")
            start += BLOCK_BYTES
