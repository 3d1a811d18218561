"""`verify`: reads datasets whole and compares everything with their manifests."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools.progress import Progress
from megatron_eso.data.manifest import Manifest
from megatron_eso.data.reader import TokenDataset, check_size, hash_file
from megatron_eso.data.shard_format import (
    BLOCK_BYTES,
    MANIFEST_FILE,
    encode_record_header,
    encode_record_padding,
    encode_shard_head,
    encode_shard_tail,
    numpy_dtype,
    record_name,
)
from megatron_eso.data.shard_writer import hash_blocks
from megatron_eso.data.tokenizer import Tokenizer
from megatron_eso.errors import DataError


def find_datasets(directory: Path) -> list[Path]:
    """The dataset at a directory, or those in its `train` and `validation`."""
    splits = [directory / name for name in ("train", "validation")]
    found = [split for split in splits if (split / MANIFEST_FILE).is_file()]
    return found if found and not (directory / MANIFEST_FILE).is_file() else [directory]


def verify_datasets(directory: Path) -> None:
    """Check every byte of the datasets at a directory; print what is wrong.

    Raises:
        DataError: something is wrong.
    """
    problems = []
    for dataset_directory in find_datasets(directory):
        dataset = TokenDataset.open(dataset_directory)
        found = [*_check_tokenizer(dataset), *_Verifier(dataset).find_problems()]
        for problem in found:
            sys.stdout.write(f"{problem}\n")
        if not found:
            manifest = dataset.manifest
            sys.stdout.write(
                f"{dataset_directory}: sound, {len(manifest.shards)} shards, "
                f"{manifest.num_tokens} tokens, {manifest.num_documents} documents, "
                f"dataset id {dataset.dataset_id}\n"
            )
        problems += found
    if problems:
        raise DataError(
            f"{directory}: {len(problems)} problems, first: {problems[0]}; "
            "restore the dataset from its source or build it again"
        )


def _check_tokenizer(dataset: TokenDataset) -> Iterator[str]:
    directory = dataset.tokenizer_directory
    for file in dataset.manifest.tokenizer_files:
        check_size(directory, file)
        if hash_file(directory / file.name) != file.sha256:
            yield f"{directory / file.name}: sha256 differs"
            return
    if Tokenizer.load(directory).fingerprint() != dataset.manifest.tokenizer:
        yield f"{directory}: not the tokenizer of the manifest"


class _Verifier:
    """One pass over the shards of a dataset."""

    def __init__(self, dataset: TokenDataset) -> None:
        self._directory = dataset.directory
        self._manifest: Manifest = dataset.manifest
        self._layout = self._manifest.layout
        self._num_documents = 0
        read = self._directory.joinpath
        self._blocks = np.fromfile(read(self._manifest.blocks.name), dtype="<u8")
        self._starts = np.fromfile(read(self._manifest.documents.name), dtype="<u8")

    def find_problems(self) -> Iterator[str]:
        """Say what is wrong, one line each."""
        progress = Progress("verify", sum(shard.bytes for shard in self._manifest.shards))
        for shard, file in enumerate(self._manifest.shards):
            yield from self._check_shard(shard, self._directory / file.name)
            progress.advance(file.bytes)
        if self._num_documents != self._manifest.num_documents:
            yield (
                f"{self._directory}: {self._num_documents} documents, "
                f"not {self._manifest.num_documents}"
            )
        progress.finish()

    def _check_shard(self, shard: int, path: Path) -> Iterator[str]:
        layout = self._layout
        sha256 = hashlib.sha256()
        num_problems = 0
        with path.open("rb") as file:

            def take(num_bytes: int) -> bytes:
                data = file.read(num_bytes)
                sha256.update(data)
                return data

            head = encode_shard_head(
                layout.dtype, layout.record_tokens, layout.shard_records, shard
            )
            archive_is_sound = take(len(head)) == head
            first = shard * layout.shard_records
            for record in range(first, first + layout.shard_num_records(shard)):
                num_bytes = layout.record_bytes(record)
                header = encode_record_header(record, layout.dtype, num_bytes)
                padding = encode_record_padding(num_bytes)
                archive_is_sound &= take(len(header)) == header
                for problem in self._check_record(record, take(num_bytes)):
                    num_problems += 1
                    yield f"{path}, {record_name(record, layout.dtype)}: {problem}"
                archive_is_sound &= take(len(padding)) == padding
            archive_is_sound &= take(len(encode_shard_tail())) == encode_shard_tail()
        if not archive_is_sound:
            yield f"{path}: the archive's headers or padding are damaged"
        elif not num_problems and sha256.hexdigest() != self._manifest.shards[shard].sha256:
            yield f"{path}: sha256 differs from the manifest's"

    def _check_record(self, record: int, data: bytes) -> Iterator[str]:
        first = record * self._layout.blocks_per_record
        hashes = hash_blocks(data)
        expected = self._blocks[first : first + len(hashes)]
        if len(data) != self._layout.record_bytes(record) or len(hashes) != len(expected):
            yield "cut off"
            return
        for block in np.flatnonzero(hashes != expected).tolist():
            offset = self._layout.record_offset(record) + block * BLOCK_BYTES
            yield f"the block at offset {offset} is damaged"
        tokens = np.frombuffer(data, dtype=numpy_dtype(self._layout.dtype))
        tokenizer = self._manifest.tokenizer
        if tokens.max() >= tokenizer.vocab_size:
            yield f"id {tokens.max()} lies outside the vocabulary of {tokenizer.vocab_size}"
        if (tokens == tokenizer.mask_token_id).any():
            yield f"the mask token {tokenizer.mask_token_id} occurs"
        if self._starts[record] != self._num_documents:
            yield f"begins in document {self._num_documents}, not {self._starts[record]}"
        self._num_documents += int(np.count_nonzero(tokens == tokenizer.eos_token_id))
