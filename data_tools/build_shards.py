"""`build`: text files to a dataset of token shards."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.documents import InputFile, ReadFile, Unit, find_inputs, read_units
from data_tools.encoding import EncodedPart, EncodingNotes, UnitEncoder, encode_units
from data_tools.progress import Progress
from data_tools.publication import publish_directory
from megatron_eso.data.manifest import Source, Split
from megatron_eso.data.shard_format import RECORD_TOKENS, SHARD_RECORDS
from megatron_eso.data.shard_writer import DatasetWriter
from megatron_eso.data.tokenizer import Tokenizer
from megatron_eso.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """What to build."""

    inputs: Sequence[str]
    """JSONL files, text files, folders of them."""
    tokenizer: str
    out: Path
    text_key: str = "text"
    num_workers: int = 1
    validation_share: float = 0.0
    """Above 0 the datasets `out/train` and `out/validation` are made."""
    record_tokens: int = RECORD_TOKENS
    shard_records: int = SHARD_RECORDS


def build_dataset(options: BuildOptions) -> dict[Split, str]:
    """Build the dataset, or two with a validation share; equal input gives equal bytes.

    Returns:
        The id of each dataset by split.

    Raises:
        ConfigError: an input or the output path is wrong.
        DataError: text or tokenizer are damaged or do not fit.
    """
    files = find_inputs(options.inputs)
    tokenizer = Tokenizer.load(options.tokenizer)
    splits: tuple[Split, ...] = ("train", "validation") if options.validation_share else ("all",)
    with publish_directory(options.out) as building:
        directories = {split: building if split == "all" else building / split for split in splits}
        writers = {
            split: _SplitWriter(directory, tokenizer, files, options)
            for split, directory in directories.items()
        }
        found, notes = _encode_files(files, tokenizer, options, writers)
        _check_not_empty(writers, options.validation_share)
        ids = {split: writer.finish(split, found) for split, writer in writers.items()}
    _report(options.out, writers, ids, notes)
    return ids


class _SplitWriter:
    """Writer of one split, with the counts for its manifest."""

    def __init__(
        self,
        directory: Path,
        tokenizer: Tokenizer,
        files: Sequence[InputFile],
        options: BuildOptions,
    ) -> None:
        directory.mkdir(exist_ok=True)
        self._files = files
        self._share = options.validation_share
        self._documents_of_file = [0] * len(files)
        self._num_text_bytes = 0
        self._writer = DatasetWriter(
            directory,
            tokenizer=tokenizer.fingerprint(),
            tokenizer_files=tokenizer.files(),
            record_tokens=options.record_tokens,
            shard_records=options.shard_records,
        )

    @property
    def num_documents(self) -> int:
        """Documents so far."""
        return sum(self._documents_of_file)

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return self._writer.num_tokens

    def append(self, file: int, part: EncodedPart) -> None:
        """Append tokens that came from the file of this number."""
        self._writer.append(part.tokens)
        self._documents_of_file[file] += part.num_documents
        self._num_text_bytes += part.num_text_bytes

    def finish(self, split: Split, found: Sequence[ReadFile]) -> str:
        """Publish the dataset; return its id."""
        sources = [
            Source(
                path=file.name,
                bytes=read.num_bytes,
                sha256=read.sha256.hexdigest(),
                num_documents=num_documents,
            )
            for file, read, num_documents in zip(
                self._files, found, self._documents_of_file, strict=True
            )
        ]
        return self._writer.finish(
            sources=sources,
            num_text_bytes=self._num_text_bytes,
            split=split,
            validation_share=self._share,
        )


def _encode_files(
    files: Sequence[InputFile],
    tokenizer: Tokenizer,
    options: BuildOptions,
    writers: dict[Split, _SplitWriter],
) -> tuple[list[ReadFile], EncodingNotes]:
    found = [ReadFile() for _ in files]

    def read_all() -> Iterator[Unit]:
        for number, file in enumerate(files):
            yield from read_units(
                file,
                number,
                found[number],
                cut_text=tokenizer.splits_at_newlines,
                hash_text=options.validation_share > 0,
            )

    encoder = UnitEncoder(tokenizer, options.text_key, options.validation_share)
    notes = EncodingNotes()
    progress = Progress("build", sum(file.num_bytes for file in files))
    train = writers["train" if options.validation_share else "all"]
    with contextlib.closing(
        encode_units(read_all(), encoder, options.num_workers)
    ) as encoded_units:
        for encoded in encoded_units:
            if encoded.error is not None:
                raise DataError(encoded.error)
            train.append(encoded.file, encoded.train)
            if options.validation_share:
                writers["validation"].append(encoded.file, encoded.validation)
            notes.add(encoded.notes)
            progress.advance(encoded.num_bytes)
    progress.finish()
    return found, notes


def _check_not_empty(writers: dict[Split, _SplitWriter], validation_share: float) -> None:
    total = sum(writer.num_documents for writer in writers.values())
    if not total:
        raise DataError("the input holds no document with text; check --input and --text-key")
    for split, writer in writers.items():
        if not writer.num_documents:
            raise DataError(
                f"none of the {total} documents went to the {split} split at --validation "
                f"{validation_share}; change the share or give more documents"
            )


def _report(
    out: Path,
    writers: dict[Split, _SplitWriter],
    ids: dict[Split, str],
    notes: EncodingNotes,
) -> None:
    for split, writer in writers.items():
        directory = out if split == "all" else out / split
        sys.stdout.write(
            f"{directory}: {writer.num_documents} documents, {writer.num_tokens} tokens, "
            f"dataset id {ids[split]}\n"
        )
    sys.stdout.write(
        f"round trip: {notes.exact_round_trips} of {notes.round_trips} sampled documents exact; "
        f"U+2581 in the text (comes back as a space): {notes.word_boundary_characters}; "
        f"empty documents left out: {notes.empty_documents}\n"
    )
