"""`inspect`: what a dataset holds, and rows of it as text."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools.verify_shards import find_datasets
from megatron_eso.data.reader import TokenDataset
from megatron_eso.data.tokenizer import Tokenizer
from megatron_eso.errors import ConfigError

_MAX_SOURCES = 10
END_OF_TEXT = "<end of text>"


def inspect_datasets(directory: Path, row: int | None, sequence_length: int) -> None:
    """Print what the datasets at a directory hold, or one row as text.

    Args:
        directory: of a dataset, or of a training and a validation split.
        row: number of the row to print, or None.
        sequence_length: of rows.

    Raises:
        ConfigError: there is no such row.
        DataError: a dataset is damaged.
    """
    for dataset_directory in find_datasets(directory):
        dataset = TokenDataset.open(dataset_directory)
        lines = (
            _describe(dataset, sequence_length)
            if row is None
            else _describe_row(dataset, row, sequence_length)
        )
        for line in lines:
            sys.stdout.write(f"{line}\n")


def _describe(dataset: TokenDataset, sequence_length: int) -> Iterator[str]:
    manifest = dataset.manifest
    tokenizer = manifest.tokenizer
    num_rows = manifest.layout.num_rows(sequence_length)
    yield f"{dataset.directory}"
    yield f"  dataset id     {dataset.dataset_id}"
    yield f"  split          {manifest.split} (validation share {manifest.validation_share})"
    yield (
        f"  tokens         {manifest.num_tokens} ({manifest.dtype}) in {len(manifest.shards)} "
        f"shards, {manifest.layout.num_records} records of {manifest.record_tokens}"
    )
    yield (
        f"  documents      {manifest.num_documents}, "
        f"{manifest.num_tokens / manifest.num_documents:.1f} tokens each on average"
    )
    yield (
        f"  text           {manifest.num_text_bytes} bytes, "
        f"{manifest.num_text_bytes / manifest.num_tokens:.3f} bytes a token"
    )
    yield f"  rows           {num_rows} of {sequence_length} tokens"
    yield (
        f"  tokenizer      {tokenizer.kind}, {tokenizer.vocab_size} ids, mask "
        f"{tokenizer.mask_token_id}, end of text {tokenizer.eos_token_id}, pad "
        f"{tokenizer.pad_token_id}, model sha256 {tokenizer.model_sha256}"
    )
    for source in manifest.sources[:_MAX_SOURCES]:
        yield (
            f"  source         {source.path}: {source.bytes} bytes, "
            f"{source.num_documents} documents here, sha256 {source.sha256}"
        )
    if len(manifest.sources) > _MAX_SOURCES:
        yield f"  source         and {len(manifest.sources) - _MAX_SOURCES} more files"


def _describe_row(dataset: TokenDataset, row: int, sequence_length: int) -> Iterator[str]:
    num_rows = dataset.num_rows(sequence_length)
    if not 0 <= row < num_rows:
        raise ConfigError(
            f"--row {row}: {dataset.directory} has rows 0 to {num_rows - 1} of "
            f"{sequence_length} tokens"
        )
    tokenizer = Tokenizer.load(dataset.tokenizer_directory)
    (tokens_T,) = dataset.rows(np.array([row]), sequence_length)
    ends = np.flatnonzero(tokens_T == tokenizer.eos_token_id)
    yield f"{dataset.directory}, row {row} of {num_rows}, {sequence_length} tokens"
    yield END_OF_TEXT.join(
        tokenizer.decode([token for token in part.tolist() if token != tokenizer.eos_token_id])
        for part in np.split(tokens_T, ends)
    )
