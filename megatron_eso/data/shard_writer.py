"""Writes a dataset: tokens in; shards, hashes and manifest out; in memory that does not grow.

The manifest is written last, after everything that it names has reached the disk: a directory
without one is not a dataset, so that an interrupted writer leaves nothing that looks complete.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_eso.data.manifest import (
    HashedFile,
    Manifest,
    Source,
    Split,
    TokenizerFingerprint,
    dataset_id,
)
from megatron_eso.data.shard_format import (
    BLOCK_BYTES,
    BLOCKS_FILE,
    DOCUMENTS_FILE,
    MANIFEST_FILE,
    RECORD_TOKENS,
    SHARD_RECORDS,
    TOKENIZER_FOLDER,
    choose_dtype,
    encode_record_header,
    encode_record_padding,
    encode_shard_head,
    encode_shard_tail,
    numpy_dtype,
    shard_name,
)
from megatron_eso.errors import DataError
from megatron_eso.files import sync_path


class DatasetWriter:
    """Appends tokens to a new dataset.

    Args:
        directory: an empty directory.
        tokenizer: of the tokens; it must have an end-of-text token.
        tokenizer_files: content of the tokenizer's files by name, kept beside the shards.
        record_tokens: tokens of a record.
        shard_records: records of a shard.

    Raises:
        DataError: the tokenizer has no end-of-text token, or the disk refuses.
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
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-text token to separate documents; "
                "use one that has (data_tools train-tokenizer makes it)"
            )
        self._directory = directory
        self._tokenizer = tokenizer
        self._tokenizer_files = tokenizer_files
        self._shard_records = shard_records
        self._dtype = choose_dtype(tokenizer.vocab_size)
        self._record = np.empty(record_tokens, dtype=numpy_dtype(self._dtype))
        self._fill = 0
        self._num_tokens = 0
        self._num_documents = 0
        self._document_starts: list[int] = []
        self._shards: list[HashedFile] = []
        self._shard: HashingFile | None = None
        self._blocks = HashingFile(directory / BLOCKS_FILE)

    @property
    def num_tokens(self) -> int:
        """Tokens appended so far."""
        return self._num_tokens

    def append(self, tokens: npt.NDArray[np.integer]) -> None:
        """Append tokens [N]: documents, or parts of one, each with its end-of-text token.

        The ids must lie in the tokenizer's vocabulary; the caller sees to that.
        """
        self._num_tokens += len(tokens)
        while len(tokens):
            taken = min(len(tokens), len(self._record) - self._fill)
            self._record[self._fill : self._fill + taken] = tokens[:taken]
            self._fill += taken
            tokens = tokens[taken:]
            if self._fill == len(self._record):
                self._write_record()

    def finish(
        self,
        *,
        sources: Sequence[Source],
        num_text_bytes: int,
        split: Split = "all",
        validation_share: float = 0.0,
    ) -> str:
        """Write what is left and publish the manifest.

        Returns:
            The dataset id.

        Raises:
            DataError: there are no tokens.
        """
        if not self._num_tokens:
            raise DataError(f"there are no tokens to write to {self._directory}; check the input")
        if self._fill:
            self._write_record()
        self._close_shard()
        documents = HashingFile(self._directory / DOCUMENTS_FILE)
        documents.write(np.array(self._document_starts, dtype="<u8").tobytes())
        manifest = Manifest(
            dtype=self._dtype,
            record_tokens=len(self._record),
            shard_records=self._shard_records,
            num_tokens=self._num_tokens,
            num_documents=self._num_documents,
            num_text_bytes=num_text_bytes,
            split=split,
            validation_share=validation_share,
            tokenizer=self._tokenizer,
            tokenizer_files=self._write_tokenizer(),
            sources=tuple(sources),
            shards=tuple(self._shards),
            blocks=self._blocks.close(),
            documents=documents.close(),
        )
        encoded = manifest.encode()
        unfinished = self._directory / f"{MANIFEST_FILE}.unfinished"
        file = HashingFile(unfinished)
        file.write(encoded)
        file.close()
        sync_path(self._directory)
        unfinished.rename(self._directory / MANIFEST_FILE)
        sync_path(self._directory)
        return dataset_id(encoded)

    def _write_record(self) -> None:
        record = len(self._document_starts)
        shard, place = divmod(record, self._shard_records)
        if place == 0:
            self._close_shard()
            self._shard = HashingFile(self._directory / shard_name(shard))
            self._shard.write(
                encode_shard_head(self._dtype, len(self._record), self._shard_records, shard)
            )
        assert self._shard is not None
        tokens = self._record[: self._fill]
        data = tokens.data.cast("B")
        self._shard.write(encode_record_header(record, self._dtype, len(data)))
        self._shard.write(data)
        self._shard.write(encode_record_padding(len(data)))
        self._blocks.write(hash_blocks(data).tobytes())
        self._document_starts.append(self._num_documents)
        self._num_documents += int(np.count_nonzero(tokens == self._tokenizer.eos_token_id))
        self._fill = 0

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.write(encode_shard_tail())
            self._shards.append(self._shard.close())
            self._shard = None

    def _write_tokenizer(self) -> tuple[HashedFile, ...]:
        folder = self._directory / TOKENIZER_FOLDER
        folder.mkdir()
        written = []
        for name in sorted(self._tokenizer_files):
            file = HashingFile(folder / name)
            file.write(self._tokenizer_files[name])
            written.append(file.close())
        sync_path(folder)
        return tuple(written)


class HashingFile:
    """A new file that is hashed as it is written, and on the disk once closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO = path.open("xb")
        self._sha256 = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._file.write(data)
        self._sha256.update(data)
        self._bytes += len(data)

    def close(self) -> HashedFile:
        """Flush to the disk and say what was written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return HashedFile(name=self._path.name, bytes=self._bytes, sha256=self._sha256.hexdigest())


def hash_blocks(data: bytes | memoryview) -> npt.NDArray[np.uint64]:
    """Hashes of a record's blocks, uint64 [blocks], little endian."""
    return np.array(
        [
            xxhash.xxh3_64_intdigest(data[start : start + BLOCK_BYTES])
            for start in range(0, len(data), BLOCK_BYTES)
        ],
        dtype="<u8",
    )
