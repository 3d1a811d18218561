"""`inspect`: reports what a dataset holds and how long its documents are, or a row as text."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.reports.document_lengths import (
    DocumentLengths,
    choose_records,
    draw_histogram,
    measure_lengths,
)
from data_tools.reports.row_location import locate_row
from megatron_eso.data.remote.cache import ShardCache
from megatron_eso.data.remote.datasets import find_datasets, open_dataset
from megatron_eso.data.remote.shards import RemoteShards
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.errors import ConfigError

_MAX_SOURCES = 10
END_OF_TEXT = "<end of text>"


def inspect_datasets(
    location: str | Path,
    row: int | None,
    sequence_length: int,
    as_json: bool = False,
    cache: ShardCache | None = None,
) -> None:
    """Print what the datasets at a directory hold, or one row as text.

    Args:
        location: Directory or URL of a dataset, or of the folder of two splits.
        row: Number of the data row to print, or None.
        sequence_length: Tokens of a row.
        as_json: Whether to print one JSON object instead of text.
        cache: Holds local copies of remote shards; None: a cache in TMPDIR.

    Raises:
        ConfigError: The dataset has no such row.
        DataError: A dataset is damaged.
    """
    datasets = {found: open_dataset(found, cache=cache) for found in find_datasets(location)}
    if row is not None:
        for found, dataset in datasets.items():
            _check_row(found, dataset, row, sequence_length)
    if as_json:
        summaries = [
            {"location": found, **_summarize(dataset, row, sequence_length)}
            for found, dataset in datasets.items()
        ]
        sys.stdout.write(json.dumps({"datasets": summaries}, indent=1) + "\n")
        return
    for found, dataset in datasets.items():
        lines = (
            _describe(dataset, sequence_length)
            if row is None
            else _describe_row(dataset, row, sequence_length)
        )
        sys.stdout.write(f"{found}\n")
        sys.stdout.writelines(f"  {line}\n" for line in lines)


def decode_row(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """Decode the tokens of a row to text, with marked ends of documents."""
    eos = tokenizer.eos_token_id
    ends = [index for index, token in enumerate(tokens) if token == eos]
    starts = [0, *(end + 1 for end in ends)]
    parts = zip(starts, [*ends, len(tokens)], strict=True)
    return END_OF_TEXT.join(tokenizer.decode(tokens[start:stop]) for start, stop in parts)


def _describe(dataset: TokenDataset, sequence_length: int) -> Iterator[str]:
    # The dataset as a whole.
    manifest = dataset.manifest
    tokenizer = manifest.tokenizer
    num_rows = manifest.layout.num_rows(sequence_length)
    yield f"dataset id     {dataset.dataset_id}"
    yield f"split          {manifest.split} (validation share {manifest.validation_share})"
    yield (
        f"tokens         {manifest.num_tokens} ({manifest.dtype}) in {len(manifest.shards)} "
        f"shards, {manifest.layout.num_records} records of {manifest.record_tokens}"
    )
    yield f"documents      {manifest.num_documents}{_describe_documents(dataset)}"
    yield (
        f"text           {manifest.num_text_bytes} bytes, "
        f"{manifest.num_text_bytes / manifest.num_tokens:.3f} bytes a token"
    )
    yield f"rows           {num_rows} of {sequence_length} tokens"
    yield (
        f"tokenizer      {tokenizer.kind}, {tokenizer.vocab_size} ids, mask "
        f"{tokenizer.mask_token_id}, end of text {tokenizer.eos_token_id}, pad "
        f"{tokenizer.pad_token_id}, model sha256 {tokenizer.model_sha256}"
    )
    # What it was made from, and its documents.
    for source in manifest.sources[:_MAX_SOURCES]:
        part = f" from {source.offset}" if source.offset else ""
        yield (
            f"source         {source.path}: {source.bytes} bytes{part}, "
            f"{source.num_documents} documents here, sha256 {source.sha256}"
        )
    if len(manifest.sources) > _MAX_SOURCES:
        yield f"source         and {len(manifest.sources) - _MAX_SOURCES} more"
    yield from _describe_lengths(dataset, _measure(dataset))


def _describe_documents(dataset: TokenDataset) -> str:
    manifest = dataset.manifest
    text = ""
    if manifest.num_documents:
        mean = manifest.num_tokens / manifest.num_documents
        text += f", {mean:.1f} tokens each on average"
    if manifest.num_duplicates is not None:
        text += f", {manifest.num_duplicates} duplicates left out"
    if manifest.shuffle_seed is not None:
        text += f", shuffled with seed {manifest.shuffle_seed}"
    return text


def _measure(dataset: TokenDataset) -> DocumentLengths:
    layout = dataset.manifest.layout
    num_records = layout.num_records
    if isinstance(dataset.shards, RemoteShards):
        # A read copies the whole shard to the cache, so only the first shard is read.
        num_records = max(1, layout.shard_num_records(0) - 1)
    return measure_lengths(dataset, choose_records(num_records))


def _describe_lengths(dataset: TokenDataset, lengths: DocumentLengths) -> Iterator[str]:
    layout = dataset.manifest.layout
    quantiles = ", ".join(f"{name} {value}" for name, value in lengths.quantiles.items())
    yield (
        f"lengths        in tokens with the end of text, of {len(lengths.lengths)} documents that "
        f"begin in {lengths.num_records} of {layout.num_records} records"
    )
    yield f"quantiles      {quantiles}"
    yield from draw_histogram(lengths.histogram)


def _check_row(location: str, dataset: TokenDataset, row: int, sequence_length: int) -> None:
    num_rows = dataset.num_rows(sequence_length)
    if not 0 <= row < num_rows:
        raise ConfigError(
            f"--row {row}: {location} has rows 0 to {num_rows - 1} of {sequence_length} tokens"
        )


def _describe_row(dataset: TokenDataset, row: int, sequence_length: int) -> Iterator[str]:
    tokenizer = Tokenizer.load(dataset.tokenizer_directory)
    (tokens_T,) = dataset.rows(np.array([row]), sequence_length)
    yield f"row            {row} of {dataset.num_rows(sequence_length)}, {sequence_length} tokens"
    yield from locate_row(dataset, row, sequence_length).describe()
    yield f"text\n{decode_row(tokenizer, tokens_T.tolist())}"


def _summarize(dataset: TokenDataset, row: int | None, sequence_length: int) -> dict[str, Any]:
    # The dataset as a whole.
    manifest = dataset.manifest
    summary = {
        "dataset_id": dataset.dataset_id,
        "split": manifest.split,
        "dtype": manifest.dtype,
        "num_tokens": manifest.num_tokens,
        "num_documents": manifest.num_documents,
        "num_duplicates": manifest.num_duplicates,
        "num_text_bytes": manifest.num_text_bytes,
        "num_shards": len(manifest.shards),
        "num_records": manifest.layout.num_records,
        "record_tokens": manifest.record_tokens,
        "sequence_length": sequence_length,
        "num_rows": manifest.layout.num_rows(sequence_length),
        "shuffle_seed": manifest.shuffle_seed,
        "tokenizer": dataclasses.asdict(manifest.tokenizer),
        "sources": [dataclasses.asdict(source) for source in manifest.sources],
    }
    if row is None:
        return summary | {"document_lengths": _measure(dataset).to_json()}
    # One row.
    (tokens_T,) = dataset.rows(np.array([row]), sequence_length)
    tokens = tokens_T.tolist()
    tokenizer = Tokenizer.load(dataset.tokenizer_directory)
    place = dataclasses.asdict(locate_row(dataset, row, sequence_length))
    text = decode_row(tokenizer, tokens)
    return summary | {"row": {"number": row, **place, "tokens": tokens, "text": text}}
