"""Writing of a dataset from tokens, in constant memory: shards, hashes and manifest.

`ShardWriter` writes one shard, `DatasetPublisher` the index files, and `DatasetWriter` both for a
stream of tokens. A file gets its name after its content is on the disk, and the manifest is the
last file. A directory without a manifest is not a dataset, so an interrupted writer leaves nothing
that looks complete.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_eso.data.shards.format import (
    BLOCK_BYTES,
    BLOCKS_FILE,
    DOCUMENTS_FILE,
    MANIFEST_FILE,
    RECORD_TOKENS,
    SHARD_RECORDS,
    TOKENIZER_FOLDER,
    TokenDtype,
    choose_dtype,
    encode_record_header,
    encode_record_padding,
    encode_shard_head,
    encode_shard_tail,
    numpy_dtype,
    shard_name,
)
from megatron_eso.data.shards.manifest import HashedFile, Manifest, Source, Split, dataset_id
from megatron_eso.data.tokenizers.fingerprint import TokenizerFingerprint
from megatron_eso.errors import DataError
from megatron_eso.files import new_file


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordFormat:
    """The format of records and shards."""

    dtype: TokenDtype
    record_tokens: int
    shard_records: int
    eos_token_id: int
    """The token that ends every document."""

    @property
    def shard_tokens(self) -> int:
        """Tokens of every shard except the last."""
        return self.record_tokens * self.shard_records


def choose_format(
    tokenizer: TokenizerFingerprint, record_tokens: int, shard_records: int
) -> RecordFormat:
    """Return the format for the ids of a tokenizer.

    Raises:
        DataError: The tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-text token to separate documents; "
            "use one that has (data_tools train-tokenizer makes it)"
        )
    return RecordFormat(
        dtype=choose_dtype(tokenizer.vocab_size),
        record_tokens=record_tokens,
        shard_records=shard_records,
        eos_token_id=tokenizer.eos_token_id,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenShard:
    """A shard on the disk, with its entries in the index files."""

    file: HashedFile
    num_tokens: int
    blocks: npt.NDArray[np.uint64]
    """Hashes of all blocks."""
    document_ends: npt.NDArray[np.uint64]
    """End-of-text tokens in each record."""


class ShardWriter:
    """A writer of one shard.

    Args:
        directory: The directory of the dataset.
        format: Record format of the dataset.
        shard: Number of the shard.
    """

    def __init__(self, directory: Path, format: RecordFormat, shard: int) -> None:
        self._format = format
        self._first_record = shard * format.shard_records
        self._record = np.empty(format.record_tokens, dtype=numpy_dtype(format.dtype))
        self._fill = 0
        self._num_tokens = 0
        self._blocks: list[npt.NDArray[np.uint64]] = []
        self._document_ends: list[int] = []
        self._file = HashingFile(directory / shard_name(shard))
        self._file.write(
            encode_shard_head(format.dtype, format.record_tokens, format.shard_records, shard)
        )

    @property
    def room(self) -> int:
        """Number of tokens for which the shard still has room."""
        return self._format.shard_tokens - self._num_tokens

    def append(self, tokens: npt.NDArray[np.integer]) -> None:
        """Append tokens [N], at most `room` of them."""
        assert len(tokens) <= self.room
        self._num_tokens += len(tokens)
        while len(tokens):
            taken = min(len(tokens), len(self._record) - self._fill)
            self._record[self._fill : self._fill + taken] = tokens[:taken]
            self._fill += taken
            tokens = tokens[taken:]
            if self._fill == len(self._record):
                self._write_record()

    def close(self) -> WrittenShard:
        """Write the last record; the shard is then on the disk under its name."""
        if self._fill:
            self._write_record()
        self._file.write(encode_shard_tail())
        return WrittenShard(
            file=self._file.close(),
            num_tokens=self._num_tokens,
            blocks=np.concatenate(self._blocks),
            document_ends=np.array(self._document_ends, dtype="<u8"),
        )

    def _write_record(self) -> None:
        tokens = self._record[: self._fill]
        data = tokens.data.cast("B")
        record = self._first_record + len(self._document_ends)
        self._file.write(encode_record_header(record, self._format.dtype, len(data)))
        self._file.write(data)
        self._file.write(encode_record_padding(len(data)))
        self._blocks.append(hash_blocks(data))
        self._document_ends.append(int(np.count_nonzero(tokens == self._format.eos_token_id)))
        self._fill = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetOrigin:
    """The origin of a dataset's tokens, for its manifest."""

    tokenizer: TokenizerFingerprint
    tokenizer_files: Mapping[str, bytes]
    """Content of the tokenizer's files by name, kept with the shards."""
    sources: Sequence[Source]
    num_text_bytes: int
    split: Split = "all"
    validation_share: float = 0.0
    shuffle_seed: int | None = None
    num_duplicates: int | None = None


class DatasetPublisher:
    """A writer of the index files: block hashes, documents, tokenizer, manifest.

    Args:
        directory: The directory of the dataset.
        format: Record format of the dataset.
    """

    def __init__(self, directory: Path, format: RecordFormat) -> None:
        self._directory = directory
        self._format = format
        self._num_tokens = 0
        self._shards: list[HashedFile] = []
        self._document_ends: list[npt.NDArray[np.uint64]] = []
        self._blocks = HashingFile(directory / BLOCKS_FILE)

    def add(self, shard: WrittenShard) -> None:
        """Add the next shard to the index files."""
        self._num_tokens += shard.num_tokens
        self._shards.append(shard.file)
        self._document_ends.append(shard.document_ends)
        self._blocks.write(shard.blocks.tobytes())

    def publish(self, origin: DatasetOrigin) -> str:
        """Write the files, the manifest last.

        Returns:
            The dataset id.

        Raises:
            DataError: There are no tokens.
        """
        # The document of each record's first token.
        if not self._num_tokens:
            raise DataError(f"there are no tokens to write to {self._directory}; check the input")
        ends = np.concatenate(self._document_ends)
        starts = np.cumsum(ends, dtype="<u8") - ends
        documents = HashingFile(self._directory / DOCUMENTS_FILE)
        documents.write(starts.astype("<u8").tobytes())
        # The manifest, after all files that it lists.
        manifest = Manifest(
            dtype=self._format.dtype,
            record_tokens=self._format.record_tokens,
            shard_records=self._format.shard_records,
            num_tokens=self._num_tokens,
            num_documents=int(ends.sum()),
            num_text_bytes=origin.num_text_bytes,
            num_duplicates=origin.num_duplicates,
            split=origin.split,
            validation_share=origin.validation_share,
            shuffle_seed=origin.shuffle_seed,
            tokenizer=origin.tokenizer,
            tokenizer_files=self._write_tokenizer(origin.tokenizer_files),
            sources=tuple(origin.sources),
            shards=tuple(self._shards),
            blocks=self._blocks.close(),
            documents=documents.close(),
        )
        encoded = manifest.encode()
        file = HashingFile(self._directory / MANIFEST_FILE)
        file.write(encoded)
        file.close()
        return dataset_id(encoded)

    def _write_tokenizer(self, files: Mapping[str, bytes]) -> tuple[HashedFile, ...]:
        folder = self._directory / TOKENIZER_FOLDER
        folder.mkdir(exist_ok=True)
        written = []
        for name in sorted(files):
            file = HashingFile(folder / name)
            file.write(files[name])
            written.append(file.close())
        return tuple(written)


class DatasetWriter:
    """A writer that appends tokens to a new dataset.

    Args:
        directory: An empty directory.
        tokenizer: The tokenizer of the tokens; it must have an end-of-text token.
        tokenizer_files: Content of the tokenizer's files by name, which the dataset keeps.
        record_tokens: Tokens of a record.
        shard_records: Records of a shard.

    Raises:
        DataError: The tokenizer has no end-of-text token.
    """

    def __init__(
        self,
        directory: Path,
        *,
        tokenizer: TokenizerFingerprint,
        tokenizer_files: Mapping[str, bytes],
        record_tokens: int = RECORD_TOKENS,
        shard_records: int = SHARD_RECORDS,
    ) -> None:
        self._directory = directory
        self._tokenizer = tokenizer
        self._tokenizer_files = tokenizer_files
        self._format = choose_format(tokenizer, record_tokens, shard_records)
        self._publisher = DatasetPublisher(directory, self._format)
        self._num_tokens = 0
        self._num_shards = 0
        self._shard: ShardWriter | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens appended so far."""
        return self._num_tokens

    def append(self, tokens: npt.NDArray[np.integer]) -> None:
        """Append tokens [N]: documents, or parts of one, each with its end-of-text token.

        The caller checks that the ids are in the tokenizer's vocabulary.
        """
        self._num_tokens += len(tokens)
        while len(tokens):
            if self._shard is None:
                self._shard = ShardWriter(self._directory, self._format, self._num_shards)
                self._num_shards += 1
            taken = min(len(tokens), self._shard.room)
            self._shard.append(tokens[:taken])
            tokens = tokens[taken:]
            if not self._shard.room:
                self._close_shard()

    def finish(
        self,
        *,
        sources: Sequence[Source],
        num_text_bytes: int,
        split: Split = "all",
        validation_share: float = 0.0,
    ) -> str:
        """Write the last shard and publish the manifest.

        Returns:
            The dataset id.

        Raises:
            DataError: There are no tokens.
        """
        self._close_shard()
        return self._publisher.publish(
            DatasetOrigin(
                tokenizer=self._tokenizer,
                tokenizer_files=self._tokenizer_files,
                sources=sources,
                num_text_bytes=num_text_bytes,
                split=split,
                validation_share=validation_share,
            )
        )

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._publisher.add(self._shard.close())
            self._shard = None


class HashingFile:
    """A file that is hashed while it is written; `close` gives it its name, on the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._closing = ExitStack()
        self._file = self._closing.enter_context(new_file(path))
        self._sha256 = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes to the file."""
        self._file.write(data)
        self._sha256.update(data)
        self._bytes += len(data)

    def close(self) -> HashedFile:
        """Give the file its name; return its size and hash."""
        self._closing.close()
        return HashedFile(name=self._path.name, bytes=self._bytes, sha256=self._sha256.hexdigest())


def hash_blocks(data: bytes | memoryview) -> npt.NDArray[np.uint64]:
    """Return the hashes of a record's blocks, uint64 [blocks], little endian."""
    return np.array(
        [
            xxhash.xxh3_64_intdigest(data[start : start + BLOCK_BYTES])
            for start in range(0, len(data), BLOCK_BYTES)
        ],
        dtype="<u8",
    )
