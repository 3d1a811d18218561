"""`verify`: reads whole datasets and compares them with their manifests.

Where damage is found:

    opening   the manifest by its checksum, all shards by their sizes, blocks.xxh3 and documents.u64
              by their hashes
    reading   the tokens by the hash of every block that is read, also if a file shrinks later
    verify    all of these; also the headers and padding of the archives, the tokenizer's files, ids
              outside the vocabulary, and counts
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_eso.data.remote.cache import ShardCache
from megatron_eso.data.remote.datasets import find_datasets
from megatron_eso.data.remote.folder import is_remote
from megatron_eso.data.remote.shards import RemoteShards
from megatron_eso.data.shards.format import (
    BLOCK_BYTES,
    TOKENIZER_FOLDER,
    encode_record_header,
    encode_record_padding,
    encode_shard_head,
    encode_shard_tail,
    numpy_dtype,
    record_name,
)
from megatron_eso.data.shards.manifest import RESTORE, HashedFile, Manifest, read_manifest
from megatron_eso.data.shards.reader import check_size, hash_file
from megatron_eso.data.shards.sources import LocalShards, ShardSource
from megatron_eso.data.shards.writer import hash_blocks
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.errors import DataError
from megatron_eso.progress import Progress
from megatron_eso.quantities import format_count


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """Result of the check of one dataset."""

    location: str
    manifest: Manifest | None
    """None where the manifest itself is missing or damaged."""
    dataset_id: str | None
    problems: tuple[str, ...]
    """One line for each problem."""


def verify_datasets(
    *locations: str | Path, as_json: bool = False, cache: ShardCache | None = None
) -> None:
    """Check every byte of datasets, and print one line for each problem.

    Args:
        locations: Directories or URLs of datasets, or of folders of two splits.
        as_json: Whether to print one JSON object instead of text.
        cache: Holds local copies of remote shards; None: a cache in TMPDIR.

    Raises:
        DataError: A dataset has a problem.
    """
    verifications = [
        verify_dataset(found, cache) for location in locations for found in find_datasets(location)
    ]
    if as_json:
        summaries = [_summarize(verification) for verification in verifications]
        sys.stdout.write(json.dumps({"datasets": summaries}, indent=1) + "\n")
    else:
        for verification in verifications:
            sys.stdout.writelines(f"{line}\n" for line in _describe(verification))
    problems = [problem for verification in verifications for problem in verification.problems]
    if problems:
        broken = next(verification for verification in verifications if verification.problems)
        # Some problems name their remedy already.
        is_named = broken.manifest is None or RESTORE in problems[0]
        raise DataError(
            f"{broken.location}: {format_count(len(problems), 'problem')}, "
            f"first: {problems[0]}{'' if is_named else f'; {RESTORE}'}"
        )


def verify_dataset(location: str | Path, cache: ShardCache | None = None) -> Verification:
    """Check every byte of a dataset, with a thread per core and a shard at a time in each."""
    try:
        remote = None
        if is_remote(location):
            remote = RemoteShards.connect(str(location), cache or ShardCache.at())
        directory = remote.directory if remote else Path(location)
        manifest, dataset_id = read_manifest(directory)
    except DataError as error:
        return Verification(
            location=str(location), manifest=None, dataset_id=None, problems=(str(error),)
        )
    shards = remote or LocalShards(directory, manifest)
    problems = (
        *_check_tokenizer(directory / TOKENIZER_FOLDER, manifest),
        *_check_shards(directory, manifest, shards),
    )
    return Verification(
        location=str(location), manifest=manifest, dataset_id=dataset_id, problems=problems
    )


def _describe(verification: Verification) -> Iterator[str]:
    yield from verification.problems
    manifest = verification.manifest
    if manifest is not None and not verification.problems:
        yield (
            f"{verification.location}: intact, {format_count(len(manifest.shards), 'shard')}, "
            f"{manifest.num_tokens} tokens, {format_count(manifest.num_documents, 'document')}, "
            f"dataset id {verification.dataset_id}"
        )


def _summarize(verification: Verification) -> dict[str, Any]:
    manifest = verification.manifest
    return {
        "location": verification.location,
        "dataset_id": verification.dataset_id,
        "num_shards": manifest and len(manifest.shards),
        "num_tokens": manifest and manifest.num_tokens,
        "num_documents": manifest and manifest.num_documents,
        "problems": list(verification.problems),
    }


def _check_file(directory: Path, file: HashedFile) -> str | None:
    """Describe what is wrong with a small file; None if it is intact."""
    try:
        check_size(directory, file)
        if hash_file(directory / file.name) == file.sha256:
            return None
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"cannot read {directory / file.name}: {error.strerror}"
    return f"{directory / file.name}: sha256 differs from the manifest's"


def _check_tokenizer(directory: Path, manifest: Manifest) -> Iterator[str]:
    problems = [_check_file(directory, file) for file in manifest.tokenizer_files]
    yield from filter(None, problems)
    if not any(problems) and Tokenizer.load(directory).fingerprint() != manifest.tokenizer:
        yield f"{directory}: not the tokenizer of the manifest"


def _check_shards(directory: Path, manifest: Manifest, shards: ShardSource) -> Iterator[str]:
    side_files = (manifest.blocks, manifest.documents)
    broken = [problem for file in side_files if (problem := _check_file(directory, file))]
    yield from broken
    # If an index file is broken, the sha256 of each shard still shows whether it is intact.
    verifier = _ShardVerifier(directory, manifest, shards, has_side_files=not broken)
    progress = Progress("verify", sum(shard.bytes for shard in manifest.shards))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        numbers = range(len(manifest.shards))
        for file, problems in zip(manifest.shards, pool.map(verifier.check, numbers), strict=True):
            yield from problems
            progress.advance(file.bytes)
    progress.finish()


class _ShardVerifier:
    """A check of single shards, from any number of threads."""

    def __init__(
        self, directory: Path, manifest: Manifest, shards: ShardSource, *, has_side_files: bool
    ) -> None:
        self._manifest = manifest
        self._shards = shards
        self._layout = manifest.layout
        self._has_side_files = has_side_files
        if has_side_files:
            self._blocks = np.memmap(directory / manifest.blocks.name, dtype="<u8", mode="r")
            starts = np.fromfile(directory / manifest.documents.name, dtype="<u8")
            self._document_ends = np.diff(starts.astype(np.int64), append=manifest.num_documents)

    def check(self, shard: int) -> list[str]:
        """List the problems of a shard, one line each."""
        name, expected = self._shards.name(shard), self._manifest.shards[shard].bytes
        try:
            with os.fdopen(self._shards.open(shard), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected:
                    return [f"{name} has {size} bytes, not {expected}"]
                return list(self._read_shard(shard, name, file))
        except DataError as error:
            return [str(error)]
        except OSError as error:
            return [f"cannot read {name}: {error.strerror}"]

    def _read_shard(self, shard: int, name: str, file: BinaryIO) -> Iterator[str]:
        layout = self._layout
        sha256 = hashlib.sha256()
        num_problems = 0

        # Every byte is hashed.
        def take(num_bytes: int) -> bytes:
            data = file.read(num_bytes)
            sha256.update(data)
            return data

        is_archive_intact = _expect(
            take,
            encode_shard_head(layout.dtype, layout.record_tokens, layout.shard_records, shard),
        )
        # The records, each with a header and padding.
        first = shard * layout.shard_records
        for record in range(first, first + layout.shard_num_records(shard)):
            num_bytes = layout.record_bytes(record)
            header = encode_record_header(record, layout.dtype, num_bytes)
            is_archive_intact &= _expect(take, header)
            for problem in self._check_record(record, take(num_bytes)):
                num_problems += 1
                yield f"{name}, record {record_name(record, layout.dtype)}: {problem}"
            is_archive_intact &= _expect(take, encode_record_padding(num_bytes))
        is_archive_intact &= _expect(take, encode_shard_tail())
        if not is_archive_intact:
            yield f"{name}: the archive's headers or padding are damaged"
        elif not num_problems and sha256.hexdigest() != self._manifest.shards[shard].sha256:
            yield f"{name}: sha256 differs from the manifest's"

    def _check_record(self, record: int, data: bytes) -> Iterator[str]:
        layout, tokenizer = self._layout, self._manifest.tokenizer
        if len(data) != layout.record_bytes(record):
            yield "cut off"
            return
        if self._has_side_files:
            hashes = hash_blocks(data)
            first = record * layout.blocks_per_record
            damaged = np.flatnonzero(hashes != self._blocks[first : first + len(hashes)])
            for block in damaged.tolist():
                offset = layout.record_offset(record) + block * BLOCK_BYTES
                yield f"the block at offset {offset} is damaged"
            if damaged.size:
                return
        tokens = np.frombuffer(data, dtype=numpy_dtype(layout.dtype))
        if tokens.max() >= tokenizer.vocab_size:
            yield f"id {tokens.max()} is not in the vocabulary of {tokenizer.vocab_size}"
        if (tokens == tokenizer.mask_token_id).any():
            yield f"the mask token {tokenizer.mask_token_id} occurs"
        if self._has_side_files:
            num_ends = int(np.count_nonzero(tokens == tokenizer.eos_token_id))
            if num_ends != self._document_ends[record]:
                yield (
                    f"{num_ends} documents end in it, not {self._document_ends[record]} "
                    f"as {self._manifest.documents.name} states"
                )


def _expect(take: Callable[[int], bytes], content: bytes) -> bool:
    return take(len(content)) == content
