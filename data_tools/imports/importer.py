"""`import-tokens`: makes a dataset from token files of other programs, as they are."""

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
    """Options of `import-tokens`."""

    kind: str
    """A value of `--from`."""
    inputs: list[str]
    tokenizer: str
    """Path of the tokenizer that made the tokens."""
    out: Path
    validation_share: float = 0.0
    """Share of the documents for `out/validation`; 0 makes one dataset, `out`."""
    record_tokens: int = RECORD_TOKENS
    shard_records: int = SHARD_RECORDS


def import_tokens(options: ImportOptions) -> dict[Split, str]:
    """Make one dataset, or two with a validation share; equal input gives equal bytes.

    Returns:
        The id of each dataset by split.

    Raises:
        ConfigError: An input or the output path is wrong.
        DataError: A file is damaged, or does not fit the tokenizer.
    """
    # The tokenizer and the inputs are checked before anything is written.
    tokenizer = Tokenizer.load(options.tokenizer)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"--tokenizer {options.tokenizer}: has no end-of-text token to separate documents; "
            "name it as eos_token in a tokenizer_config.json in the tokenizer's folder"
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
    # What was made.
    for split, writer in writers.items():
        sys.stdout.write(
            f"{options.out if split == 'all' else options.out / split}: "
            f"{splitter.num_documents(split)} documents, {writer.num_tokens} tokens, dataset id "
            f"{ids[split]}\n"
        )
    sys.stdout.write(f"end-of-text tokens added: {closer.num_added}\n")
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
