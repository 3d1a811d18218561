"""Random access to the data rows of a dataset; every byte is compared with its hash before use.

A data row is T consecutive tokens of a record. Data rows are numbered through all records. The end
of a record that is shorter than T is not used. One dataset can be read with any T.

A block that cannot be read or does not match its hash is read again a few times
(`checked_blocks.py`), because network file systems have short failures. Then the reader raises an
error that names shard, record and offset. Only records that a person lists are left out
(`quarantine.py`).

Shapes: R data rows, T tokens of a data row.
"""

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_eso.data.shards.checked_blocks import RETRY_SECONDS, BlockError, CheckedBlocks
from megatron_eso.data.shards.format import (
    BLOCK_BYTES,
    TOKENIZER_FOLDER,
    numpy_dtype,
    record_name,
)
from megatron_eso.data.shards.manifest import RESTORE, HashedFile, Manifest, read_manifest
from megatron_eso.data.shards.quarantine import Quarantine
from megatron_eso.data.shards.sources import LocalShards, ShardSource
from megatron_eso.errors import DataError

_MAX_READ_BYTES = 16 * BLOCK_BYTES


class TokenDataset:
    """A dataset opened for reading. Several threads may call its methods at once.

    Attributes:
        directory: The directory of the dataset.
        manifest: The checked manifest of the dataset.
        dataset_id: The sha256 of the manifest's file.
        shards: The source of the shards.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        dataset_id: str,
        shards: ShardSource,
        *,
        quarantine: Quarantine,
        retry_seconds: tuple[float, ...],
    ) -> None:
        """Keep the parts that `open` has checked; callers use `open`."""
        self.directory = directory
        self.manifest = manifest
        self.dataset_id = dataset_id
        self.shards = shards
        self._quarantine = quarantine
        self._layout = manifest.layout
        self._dtype = numpy_dtype(manifest.dtype)
        self._blocks = CheckedBlocks(shards, directory / manifest.blocks.name, retry_seconds)

    @classmethod
    def open(
        cls,
        directory: str | Path,
        *,
        quarantine: Quarantine | None = None,
        retry_seconds: tuple[float, ...] = RETRY_SECONDS,
        shards: ShardSource | None = None,
        check_files: bool = True,
    ) -> "TokenDataset":
        """Open a dataset; check its manifest, its index files, and the size of every local shard.

        Args:
            directory: The directory of the dataset, or of its index files alone.
            quarantine: Records whose data rows are replaced by others.
            retry_seconds: Pauses before a failed read is repeated; empty: it is not repeated.
            shards: Source of the shards, which checks their sizes; None: they are in `directory`.
            check_files: Whether to check the sizes and the index files; false where another
                process of the node does it.

        Raises:
            DataError: There is no dataset, its version is unknown, or files are missing or damaged.
        """
        # The manifest, and the quarantine list that has to fit it.
        directory = Path(directory)
        quarantine = quarantine or Quarantine()
        manifest, dataset_id = read_manifest(directory)
        quarantine.check(dataset_id, manifest.layout)
        if check_files:
            check_dataset_files(directory, manifest, with_shards=shards is None)
        return cls(
            directory,
            manifest,
            dataset_id,
            shards or LocalShards(directory, manifest),
            quarantine=quarantine,
            retry_seconds=retry_seconds,
        )

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer, the mask token included."""
        return self.manifest.tokenizer.vocab_size

    @property
    def mask_token_id(self) -> int:
        """Id of the mask token, which never occurs in the data."""
        return self.manifest.tokenizer.mask_token_id

    @property
    def num_tokens(self) -> int:
        """Tokens of the dataset, the end-of-text tokens included."""
        return self.manifest.num_tokens

    @property
    def tokenizer_directory(self) -> Path:
        """The folder of the tokenizer's files."""
        return self.directory / TOKENIZER_FOLDER

    def num_rows(self, sequence_length: int) -> int:
        """Return the number of data rows of `sequence_length` tokens.

        Raises:
            DataError: There is no data row, because every record is shorter.
            ValueError: The length is not positive.
        """
        if sequence_length < 1:
            raise ValueError(f"the sequence length must be positive, not {sequence_length}")
        rows = self._layout.num_rows(sequence_length)
        if rows == 0:
            longest = min(self.manifest.record_tokens, self.manifest.num_tokens)
            raise DataError(
                f"{self.directory} has no data row of {sequence_length} tokens: its records hold "
                f"{longest}; use a shorter sequence length or more text"
            )
        return rows

    def rows(
        self,
        indices: npt.NDArray[np.int64],
        sequence_length: int,
        *,
        sample_indices: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[np.int64]:
        """Read data rows, in the given order.

        Args:
            indices: Numbers of data rows, int64 [R], each in [0, num_rows(sequence_length)).
            sequence_length: T, tokens of a data row.
            sample_indices: Samples of the run for which they are read, int64 [R], for errors.

        Returns:
            Token ids, int64 [R, T].

        Raises:
            IndexError: A number is out of range.
            DataError: A file cannot be read, or a block does not match its hash; the message names
                shard, record, offset, data row and sample.
        """
        # Find the records of the data rows, and runs of data rows to read at once.
        index_R = self.substitute(indices, sequence_length)
        tokens_RT = np.empty((len(index_R), sequence_length), dtype=np.int64)
        if not index_R.size:
            return tokens_RT
        row_bytes = sequence_length * self._layout.itemsize
        record_R, first_token_R = self._layout.locate_rows(index_R, sequence_length)
        starts = _find_runs(index_R, record_R, max(1, _MAX_READ_BYTES // row_bytes))
        stops = np.append(starts[1:], len(index_R))
        ranges = self._layout.locate_blocks(
            record_R[starts], first_token_R[starts], (stops - starts) * sequence_length
        )
        # Read each run, and report the data row of a block that fails.
        buffer = memoryview(bytearray(ranges.num_bytes.max()))
        for start, stop, shard, offset, first_block, num_bytes, in_block in zip(
            starts.tolist(),
            stops.tolist(),
            ranges.shard.tolist(),
            ranges.offset.tolist(),
            ranges.first_block.tolist(),
            ranges.num_bytes.tolist(),
            ranges.offset_in_block.tolist(),
            strict=True,
        ):
            try:
                self._blocks.read(buffer[:num_bytes], shard, offset, first_block)
            except BlockError as error:
                # The first data row of the run that the bad block reaches. The block may be bad
                # only after the run: then its last data row.
                row = start + max(0, error.offset - offset - in_block) // row_bytes
                row = min(row, stop - 1)
                sample = None if sample_indices is None else int(sample_indices[row])
                raise DataError(
                    self._explain(error, int(record_R[row]), int(index_R[row]), sample)
                ) from error
            run = np.frombuffer(buffer, self._dtype, (stop - start) * sequence_length, in_block)
            tokens_RT[start:stop] = run.reshape(stop - start, sequence_length)
        return tokens_RT

    def substitute(
        self, indices: npt.NDArray[np.int64], sequence_length: int
    ) -> npt.NDArray[np.int64]:
        """Return the data rows that `rows` reads: those of listed records are replaced.

        Raises:
            IndexError: A number is out of range.
        """
        index_R = np.asarray(indices, dtype=np.int64)
        num_rows = self.num_rows(sequence_length)
        if index_R.size and not 0 <= index_R.min() <= index_R.max() < num_rows:
            raise IndexError(f"row numbers must be in [0, {num_rows})")
        return self._quarantine.substitute(self.dataset_id, self._layout, index_R, sequence_length)

    def _explain(self, error: BlockError, record: int, row: int, sample: int | None) -> str:
        shard = self.shards.name(record // self._layout.shard_records)
        name = record_name(record, self.manifest.dtype)
        use = "" if sample is None else f", sample {sample}"
        return (
            f"{shard}, record {name}, offset {error.offset}, data row {row}{use} {error}; "
            f"{RESTORE}; or continue without it: list record {record} of dataset "
            f"{self.dataset_id} in data.quarantine"
        )


def hash_file(path: Path) -> str:
    """Return the sha256 of a file."""
    sha256 = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while data := file.read(2**20):
            sha256.update(data)
    return sha256.hexdigest()


def check_dataset_files(directory: Path, manifest: Manifest, *, with_shards: bool) -> None:
    """Check the sizes of all files of a dataset, and the hashes of its index files.

    Args:
        directory: The directory of the dataset, or of its index files alone.
        manifest: Its manifest.
        with_shards: Whether the shards are in the directory.

    Raises:
        DataError: A file is missing or damaged.
    """
    index_files = (manifest.blocks, manifest.documents)
    for file in (*manifest.shards, *index_files) if with_shards else index_files:
        check_size(directory, file)
    for file in index_files:
        if hash_file(directory / file.name) != file.sha256:
            raise DataError(f"{directory / file.name} is damaged: its sha256 differs; {RESTORE}")


def check_size(directory: Path, file: HashedFile) -> None:
    """Compare the size of a file with the manifest's.

    Raises:
        DataError: The file is missing or has another size.
    """
    path = directory / file.name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; {RESTORE}") from error
    if size != file.bytes:
        raise DataError(f"{path} has {size} bytes, not {file.bytes}; {RESTORE}")


def _find_runs(
    index_R: npt.NDArray[np.int64], record_R: npt.NDArray[np.int64], max_rows: int
) -> npt.NDArray[np.int64]:
    """Return the starts of runs: at most `max_rows` consecutive data rows of one record."""
    breaks_R = np.ones(len(index_R), dtype=bool)
    breaks_R[1:] = (index_R[1:] != index_R[:-1] + 1) | (record_R[1:] != record_R[:-1])
    starts = np.flatnonzero(breaks_R)
    if len(starts) == len(index_R):
        return starts
    number_R = np.arange(len(index_R)) - np.repeat(starts, np.diff(np.append(starts, len(index_R))))
    return np.flatnonzero(number_R % max_rows == 0)
