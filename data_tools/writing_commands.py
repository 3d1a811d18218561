"""The subcommands that write: train-tokenizer, build, merge, import-tokens, corpus."""

import argparse
import os
from typing import Any

from data_tools.builds.dataset import BuildOptions, Part, build_dataset, merge_parts
from data_tools.builds.output import explain_path
from data_tools.imports.formats import OPTIONS, describe_formats
from data_tools.imports.importer import ImportOptions, import_tokens
from data_tools.text.embedded_corpus import write_corpus
from data_tools.text.formats import STANDARD_INPUT_FORMATS
from data_tools.text.inputs import STANDARD_INPUT, parse_separator
from data_tools.text.interface import TextOptions
from data_tools.tokenizer_training import TokenizerOptions, train_tokenizer
from megatron_eso.command_line import count, existing_path, new_path, possible_path, quote, share
from megatron_eso.data.shards.format import (
    MAX_RECORD_TOKENS,
    MAX_SHARD_RECORDS,
    RECORD_TOKENS,
    SHARD_RECORDS,
)
from megatron_eso.errors import ConfigError

MAX_VOCAB_SIZE = 2**31 - 1


def add_writing_commands(commands: Any) -> None:
    """Add the subcommands to the parser; each sets `run`, which takes the parsed arguments."""
    _add_train_tokenizer(commands)
    _add_build(commands)

    merge = commands.add_parser("merge", help="make the dataset from the parts of a build")
    merge.add_argument("out", type=new_path, metavar="OUT", help="the --out of the parts")
    _add_workers(merge)
    merge.set_defaults(run=lambda found: merge_parts(found.out, found.workers))

    _add_import_tokens(commands)

    corpus = commands.add_parser("corpus", help="write the English text that comes with Python")
    corpus.add_argument("--out", type=new_path, required=True, help="JSONL file to make")
    corpus.set_defaults(run=_write_corpus)


def _write_corpus(found: argparse.Namespace) -> None:
    with explain_path(found.out):
        write_corpus(found.out)


def _add_train_tokenizer(commands: Any) -> None:
    train = commands.add_parser("train-tokenizer", help="train a SentencePiece tokenizer")
    _add_input(train)
    train.add_argument(
        "--vocab-size",
        type=count(1, MAX_VOCAB_SIZE),
        required=True,
        help="number of ids, including the mask token",
    )
    train.add_argument("--out", type=new_path, required=True, help="directory to make")
    train.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram")
    train.set_defaults(
        run=lambda found: train_tokenizer(
            TokenizerOptions(
                inputs=found.input,
                vocab_size=found.vocab_size,
                out=found.out,
                text=_text_options(found),
                model_type=found.model_type,
            )
        )
    )


def _add_build(commands: Any) -> None:
    build = commands.add_parser(
        "build",
        help="build token shards from text",
        description="Build token shards from text. An interrupted build continues when it is run "
        "again. The result depends neither on --workers and --part nor on interruptions.",
    )
    # What is read and written, and by how many processes.
    _add_input(build)
    build.add_argument(
        "--tokenizer",
        type=existing_path,
        required=True,
        help="directory of train-tokenizer, SentencePiece model, or Hugging Face tokenizer.json",
    )
    build.add_argument(
        "--out", type=new_path, required=True, help="directory to make; the work is in OUT.building"
    )
    _add_workers(build)
    build.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="encode part I of N only (I from 0), as one job of an array; all other options must "
        "be equal; `merge OUT` makes the dataset when all parts are done",
    )
    # Which documents, in which order and in how large files.
    build.add_argument(
        "--validation",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="share of the documents, chosen by the hash of their text, for OUT/validation",
    )
    build.add_argument(
        "--deduplicate",
        action="store_true",
        help="leave out every document whose text equals an earlier one byte for byte",
    )
    build.add_argument(
        "--shuffle",
        type=count(0, 2**64 - 1),
        metavar="SEED",
        help="put the documents of the whole input into a random order (16 bytes of disk cache "
        "and a short read per document when merging)",
    )
    _add_sizes(build)
    build.set_defaults(run=lambda found: build_dataset(_build_options(found)))


def _build_options(found: argparse.Namespace) -> BuildOptions:
    return BuildOptions(
        inputs=found.input,
        tokenizer=str(found.tokenizer),
        out=found.out,
        text=_text_options(found),
        num_workers=found.workers,
        validation_share=found.validation,
        deduplicate=found.deduplicate,
        shuffle_seed=found.shuffle,
        part=found.part,
        record_tokens=found.record_tokens,
        shard_records=found.shard_records,
    )


def _add_import_tokens(commands: Any) -> None:
    command = commands.add_parser(
        "import-tokens", help="make token shards from token files of other programs"
    )
    # What is read and written.
    command.add_argument(
        "--from",
        dest="kind",
        choices=OPTIONS,
        required=True,
        help=describe_formats(),
    )
    command.add_argument(
        "--input",
        nargs="+",
        type=possible_path,
        required=True,
        metavar="PATH",
        help="files, or folders of them",
    )
    command.add_argument(
        "--tokenizer",
        type=existing_path,
        required=True,
        metavar="PATH",
        help="the tokenizer that made the tokens",
    )
    command.add_argument("--out", type=new_path, required=True, help="directory to make")
    command.add_argument(
        "--validation",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="share of the documents, chosen by the hash of their tokens, for OUT/validation",
    )
    _add_sizes(command)
    # What is done with them.
    command.set_defaults(
        run=lambda found: import_tokens(
            ImportOptions(
                kind=found.kind,
                inputs=found.input,
                tokenizer=str(found.tokenizer),
                out=found.out,
                validation_share=found.validation,
                record_tokens=found.record_tokens,
                shard_records=found.shard_records,
            )
        )
    )


def _add_input(parser: argparse.ArgumentParser) -> None:
    # Which files.
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=".jsonl or .parquet files (one document per line or row), .json files (one array of "
        "objects, or as .jsonl), .txt files, all but Parquet also .gz or .zst; folders of them, "
        "quoted globs, or - for standard input (see --format)",
    )
    parser.add_argument(
        "--format",
        choices=STANDARD_INPUT_FORMATS,
        help=f"format of standard input (default: {STANDARD_INPUT_FORMATS[0]}); that of a file "
        "follows from its suffix",
    )
    # How the documents lie in them.
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="key of the text in JSONL and Parquet"
    )
    parser.add_argument(
        "--document-separator",
        type=_separator,
        metavar="TEXT",
        help=r"text between the documents of .txt files, with escapes such as \n and \x1e "
        "(default: each file is a document)",
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at a broken line, row or file: stop, or leave it out and count it (default: stop)",
    )


def _text_options(found: argparse.Namespace) -> TextOptions:
    if found.format is not None and STANDARD_INPUT not in found.input:
        raise ConfigError(
            f"--format {found.format}: is for standard input, --input {STANDARD_INPUT}; leave it "
            "out, since the format of a file follows from its suffix"
        )
    return TextOptions(
        text_key=found.text_key,
        standard_input=found.format or STANDARD_INPUT_FORMATS[0],
        document_separator=found.document_separator,
        on_error=found.on_error,
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=count(1),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes; the result does not depend on it (default: one per core)",
    )


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--record-tokens",
        type=count(1, MAX_RECORD_TOKENS),
        default=RECORD_TOKENS,
        metavar="N",
        help="tokens of a record (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-records",
        type=count(1, MAX_SHARD_RECORDS),
        default=SHARD_RECORDS,
        metavar="N",
        help="records of a shard (default: %(default)s)",
    )


def _separator(text: str) -> str:
    try:
        return parse_separator(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(
            str(error).removeprefix("--document-separator ")
        ) from error


def _part(text: str) -> Part:
    number, slash, total = text.partition("/")
    whole = count()
    if not slash or not number.isdecimal() or not total.isdecimal():
        raise argparse.ArgumentTypeError(f"{quote(text)} is not of the form I/N, such as 0/8")
    part = Part(number=whole(number), count=whole(total))
    if part.number >= part.count:
        raise argparse.ArgumentTypeError(f"{quote(text)}: parts are numbered from 0 to N-1")
    return part
