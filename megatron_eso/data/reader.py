"""Random access to the rows of a dataset; every byte handed out has been checked by its hash.

Row i of length T is tokens [i * T, i * T + T) of the records laid end to end, cut so that no row
crosses a record: a record's tail shorter than T is not used. One dataset serves every T.

A read takes whole 64 KiB blocks with `pread` and compares their xxh3_64, every time: a block costs
some 5 us in the page cache, of which the hash is a fifth, so remembering which blocks were once
right would gain little and would let through what the disk returns after the page was dropped.
`pread` rather than a memory map: a file that shrinks underneath is then an error with a name
instead of SIGBUS, and reading releases the interpreter lock.

Shapes: R rows, T tokens of a row.
"""

import hashlib
import os
import resource
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_eso.data.manifest import HashedFile, Manifest, read_manifest
from megatron_eso.data.shard_format import (
    BLOCK_BYTES,
    TOKENIZER_FOLDER,
    numpy_dtype,
    record_name,
)
from megatron_eso.errors import DataError

_MAX_READ_BYTES = 16 * BLOCK_BYTES
_REMEDY = "restore the dataset from its source, or find the damage with python -m data_tools verify"


class TokenDataset:
    """A dataset opened for reading. Its methods may be called from several threads.

    Attributes:
        directory: of the dataset.
        manifest: its checked manifest.
        dataset_id: sha256 of the manifest's file.
    """

    def __init__(self, directory: Path, manifest: Manifest, dataset_id: str) -> None:
        """Use `open` instead, which checks the directory."""
        self.directory = directory
        self.manifest = manifest
        self.dataset_id = dataset_id
        self._layout = manifest.layout
        self._dtype = numpy_dtype(manifest.dtype)
        self._shards = _OpenShards([directory / shard.name for shard in manifest.shards])
        self._block_hashes = _OpenFile(directory / manifest.blocks.name)

    @classmethod
    def open(cls, directory: str | Path) -> "TokenDataset":
        """Open a dataset; check manifest, hashes of the index files and the size of every shard.

        Raises:
            DataError: there is no dataset, its version is unknown, or files are missing or damaged.
        """
        directory = Path(directory)
        manifest, dataset_id = read_manifest(directory)
        for file in (*manifest.shards, manifest.blocks, manifest.documents):
            check_size(directory, file)
        for file in (manifest.blocks, manifest.documents):
            if hash_file(directory / file.name) != file.sha256:
                raise DataError(
                    f"{directory / file.name} is damaged: its sha256 differs; {_REMEDY}"
                )
        return cls(directory, manifest, dataset_id)

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer, the mask token among them."""
        return self.manifest.tokenizer.vocab_size

    @property
    def mask_token_id(self) -> int:
        """Id of the mask token; it never occurs in the data."""
        return self.manifest.tokenizer.mask_token_id

    @property
    def num_tokens(self) -> int:
        """Tokens, the end-of-text tokens among them."""
        return self.manifest.num_tokens

    @property
    def tokenizer_directory(self) -> Path:
        """Where the tokenizer's files lie."""
        return self.directory / TOKENIZER_FOLDER

    def num_rows(self, sequence_length: int) -> int:
        """Rows of `sequence_length` tokens.

        Raises:
            DataError: there is none, since every record is shorter.
        """
        if sequence_length < 1:
            raise ValueError(f"the sequence length must be positive, not {sequence_length}")
        rows = self._layout.num_rows(sequence_length)
        if rows == 0:
            longest = min(self.manifest.record_tokens, self.manifest.num_tokens)
            raise DataError(
                f"{self.directory} has no row of {sequence_length} tokens: its records hold "
                f"{longest}; use a shorter sequence length or more text"
            )
        return rows

    def rows(self, indices: npt.NDArray[np.int64], sequence_length: int) -> npt.NDArray[np.int64]:
        """Read rows, in the order asked for.

        Args:
            indices: row numbers, int64 [R], each in [0, num_rows(sequence_length)).
            sequence_length: T, tokens of a row.

        Returns:
            Token ids, int64 [R, T].

        Raises:
            IndexError: a row number out of range.
            DataError: a file cannot be read, or a block does not match its hash; the message names
                shard, record, offset and row.
        """
        index_R = np.asarray(indices, dtype=np.int64)
        num_rows = self.num_rows(sequence_length)
        if index_R.size and not 0 <= index_R.min() <= index_R.max() < num_rows:
            raise IndexError(f"row numbers must be in [0, {num_rows})")
        tokens_RT = np.empty((len(index_R), sequence_length), dtype=np.int64)
        if not index_R.size:
            return tokens_RT
        record_R, first_token_R = self._layout.locate_rows(index_R, sequence_length)
        row_bytes = sequence_length * self._layout.itemsize
        starts = _find_runs(index_R, record_R, max(1, _MAX_READ_BYTES // row_bytes))
        stops = np.append(starts[1:], len(index_R))
        longest = int((stops - starts).max()) * row_bytes
        buffer = memoryview(bytearray(longest + 2 * BLOCK_BYTES))
        for start, stop, record, first_byte, row in zip(
            starts.tolist(),
            stops.tolist(),
            record_R[starts].tolist(),
            (first_token_R[starts] * self._layout.itemsize).tolist(),
            index_R[starts].tolist(),
            strict=True,
        ):
            num_rows = stop - start
            place = self._read_checked(buffer, record, first_byte, num_rows * row_bytes, row)
            run = np.frombuffer(buffer, self._dtype, num_rows * sequence_length, place)
            tokens_RT[start:stop] = run.reshape(num_rows, sequence_length)
        return tokens_RT

    def _read_checked(
        self, buffer: memoryview, record: int, first_byte: int, num_bytes: int, row: int
    ) -> int:
        """Read and check the blocks of a record that hold `num_bytes` bytes from `first_byte`.

        Returns:
            The place of `first_byte` in `buffer`.
        """
        layout = self._layout
        first_block = first_byte // BLOCK_BYTES
        last_block = (first_byte + num_bytes - 1) // BLOCK_BYTES
        start = first_block * BLOCK_BYTES
        stop = min((last_block + 1) * BLOCK_BYTES, layout.record_bytes(record))
        view = buffer[: stop - start]
        offset = layout.record_offset(record) + start
        try:
            file = self._shards.get(record // layout.shard_records)
            got = os.preadv(file.handle, [view], offset)
            expected = self._read_hashes(record, first_block, last_block + 1 - first_block)
        except OSError as error:
            where = self._describe(record, offset, row)
            raise DataError(f"cannot read {where}: {error.strerror}; {_REMEDY}") from error
        if got != len(view):
            where = self._describe(record, offset + got, row)
            raise DataError(f"{where} is cut off; {_REMEDY}")
        for number, hash_value in enumerate(expected):
            place = number * BLOCK_BYTES
            if xxhash.xxh3_64_intdigest(view[place : place + BLOCK_BYTES]) != hash_value:
                where = self._describe(record, offset + place, row)
                raise DataError(f"{where} is damaged: the block's hash differs; {_REMEDY}")
        return first_byte - start

    def _read_hashes(self, record: int, first_block: int, num_blocks: int) -> list[int]:
        first = record * self._layout.blocks_per_record + first_block
        data = os.pread(self._block_hashes.handle, 8 * num_blocks, 8 * first)
        if len(data) != 8 * num_blocks:
            raise OSError(0, f"{self.manifest.blocks.name} is cut off")
        hashes: list[int] = np.frombuffer(data, dtype="<u8").tolist()
        return hashes

    def _describe(self, record: int, offset: int, row: int) -> str:
        shard = self.manifest.shards[record // self._layout.shard_records]
        name = record_name(record, self.manifest.dtype)
        return f"{self.directory / shard.name}, record {name}, offset {offset}, row {row}"


def hash_file(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    sha256 = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(2**20):
            sha256.update(piece)
    return sha256.hexdigest()


def check_size(directory: Path, file: HashedFile) -> None:
    """Raise DataError unless a file of the dataset is there and has its size."""
    path = directory / file.name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; {_REMEDY}") from error
    if size != file.bytes:
        raise DataError(f"{path} has {size} bytes, not {file.bytes}; {_REMEDY}")


def _find_runs(
    index_R: npt.NDArray[np.int64], record_R: npt.NDArray[np.int64], max_rows: int
) -> npt.NDArray[np.int64]:
    """Where runs of consecutive rows of one record begin: each is read at once."""
    breaks_R = np.ones(len(index_R), dtype=bool)
    breaks_R[1:] = (np.diff(index_R) != 1) | (np.diff(record_R) != 0)
    starts = np.flatnonzero(breaks_R)
    place_R = np.arange(len(index_R)) - np.repeat(starts, np.diff(np.append(starts, len(index_R))))
    return np.flatnonzero(place_R % max_rows == 0)


class _OpenFile:
    """A file handle that closes when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        # Without a handle, opening has failed.
        if hasattr(self, "handle"):
            os.close(self.handle)


class _OpenShards:
    """Handles of the shards read last, no more than a quarter of what the process may hold.

    A handle in use stays open when it is dropped here.
    """

    def __init__(self, paths: list[Path]) -> None:
        soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._capacity = max(4, min(soft_limit // 4, 4096))
        self._paths = paths
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, shard: int) -> _OpenFile:
        """The open file of a shard."""
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = _OpenFile(self._paths[shard])
                if len(self._files) >= self._capacity:
                    self._files.popitem(last=False)
                self._files[shard] = file
            self._files.move_to_end(shard)
            return file
