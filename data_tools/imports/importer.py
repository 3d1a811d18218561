"""`import-tokens`: token files of other programs to a dataset, without tokenizing again."""

import sys
from dataclasses import dataclass
from pathlib import Path

from data_tools.builds.output import new_output
from data_tools.imports.documents import DocumentCloser, DocumentSplitter
from data_tools.imports.formats import open_files
from megatron_eso.data.shards.format import RECORD_TOKENS, SHARD_RECORDS
from megatron_eso.data.shards.manifest import Split
from megatron_eso.data.shards.writer import DatasetWriter
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.errors import DataError
from megatron_eso.progress import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """Which token files to import, and how."""

    kind: str
    """A value of `--from`."""
    inputs: list[str]
    tokenizer: str
    """The one that the tokens were made with."""
    out: Path
    validation_share: float = 0.0
    """Above 0 the datasets `out/train` and `out/validation` are made."""
    record_tokens: int = RECORD_TOKENS
    shard_records: int = SHARD_RECORDS


def import_tokens(options: ImportOptions) -> dict[Split, str]:
    """Make a dataset, or two with a validation share; equal input gives equal bytes.

    Returns:
        The id of each dataset by split.

    Raises:
        ConfigError: an input or the output path is wrong.
        DataError: a file is damaged, or does not fit the tokenizer.
    """
    tokenizer = Tokenizer.load(options.tokenizer)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer {options.tokenizer}: has no end-of-text token to separate documents; name "
            "it in a tokenizer_config.json in its folder (eos_token)"
        )
    files = open_files(options.kind, options.inputs, tokenizer)
    with new_output(options.out) as building:
        writers = _open_writers(options, tokenizer, building)
        closer = DocumentCloser(tokenizer)
        splitter = DocumentSplitter(options.validation_share, tokenizer.eos_token_id, writers)
        rest = sum(source.num_bytes for source in files.sources)
        progress = Progress("import-tokens", rest)
        for block in files.read_blocks():
            splitter.add(block.source, closer.close(block))
            progress.advance(block.tokens.nbytes)
            rest -= block.tokens.nbytes
        progress.advance(rest)
        progress.finish()
        ids = splitter.finish(files.sources)
    for split, writer in writers.items():
        sys.stdout.write(
            f"{options.out if split == 'all' else options.out / split}: "
            f"{splitter.num_documents(split)} documents, {writer.num_tokens} tokens, dataset id "
            f"{ids[split]}\n"
        )
    sys.stdout.write(f"end-of-text tokens added to documents without: {closer.num_added}\n")
    return ids


def _open_writers(
    options: ImportOptions, tokenizer: Tokenizer, building: Path
) -> dict[Split, DatasetWriter]:
    folders: dict[Split, Path] = {"all": building}
    if options.validation_share:
        folders = {"train": building / "train", "validation": building / "validation"}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    return {
        split: DatasetWriter(
            folder,
            tokenizer=tokenizer.fingerprint(),
            tokenizer_files=tokenizer.files(),
            record_tokens=options.record_tokens,
            shard_records=options.shard_records,
        )
        for split, folder in folders.items()
    }
