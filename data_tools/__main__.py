"""`python -m data_tools`: text to tokenizers and token shards, and looking at them."""

import argparse
import os
from pathlib import Path

from data_tools.build_shards import BuildOptions, build_dataset
from data_tools.embedded_corpus import write_corpus
from data_tools.inspect_shards import inspect_datasets
from data_tools.train_tokenizer import TokenizerOptions, train_tokenizer
from data_tools.verify_shards import verify_datasets
from megatron_eso.data.shard_format import RECORD_TOKENS, SHARD_RECORDS
from megatron_eso.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """Run a subcommand.

    Raises:
        ConfigError: the command line does not fit what is on the disk.
        DataError: text, tokenizer or shards are missing or damaged.
    """
    arguments = _make_parser().parse_args(argv)
    match arguments.command:
        case "train-tokenizer":
            train_tokenizer(
                TokenizerOptions(
                    inputs=arguments.input,
                    vocab_size=arguments.vocab_size,
                    out=arguments.out,
                    text_key=arguments.text_key,
                    model_type=arguments.model_type,
                )
            )
        case "build":
            build_dataset(
                BuildOptions(
                    inputs=arguments.input,
                    tokenizer=arguments.tokenizer,
                    out=arguments.out,
                    text_key=arguments.text_key,
                    num_workers=arguments.workers,
                    validation_share=arguments.validation,
                    record_tokens=arguments.record_tokens,
                    shard_records=arguments.shard_records,
                )
            )
        case "verify":
            verify_datasets(arguments.directory)
        case "inspect":
            inspect_datasets(arguments.directory, arguments.row, arguments.sequence_length)
        case "corpus":
            write_corpus(arguments.out)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools",
        description="Text to tokenizers and token shards, and looking at them.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train-tokenizer", help="train a SentencePiece tokenizer")
    _add_input(train)
    train.add_argument(
        "--vocab-size", type=_positive, required=True, help="ids, the mask token among them"
    )
    train.add_argument("--out", type=Path, required=True, help="directory to make")
    train.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram")

    build = commands.add_parser("build", help="build token shards from text")
    _add_input(build)
    build.add_argument(
        "--tokenizer", required=True, help="directory of train-tokenizer, or SentencePiece model"
    )
    build.add_argument("--out", type=Path, required=True, help="directory to make")
    build.add_argument(
        "--workers",
        type=_positive,
        default=len(os.sched_getaffinity(0)),
        help="processes; the result does not depend on it (default: one per core)",
    )
    build.add_argument(
        "--validation",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="share of the documents, chosen by the hash of their text, for OUT/validation",
    )
    build.add_argument("--record-tokens", type=_positive, default=RECORD_TOKENS)
    build.add_argument("--shard-records", type=_positive, default=SHARD_RECORDS)

    verify = commands.add_parser("verify", help="check every byte of a dataset")
    verify.add_argument("directory", type=Path, help="of a dataset, or of train and validation")

    inspect = commands.add_parser("inspect", help="say what a dataset holds")
    inspect.add_argument("directory", type=Path, help="of a dataset, or of train and validation")
    inspect.add_argument("--row", type=int, help="print this row as text")
    inspect.add_argument("--sequence-length", type=_positive, default=1024)

    corpus = commands.add_parser("corpus", help="write the English text that Python carries")
    corpus.add_argument("--out", type=Path, required=True, help="JSONL file to make")
    return parser


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=".jsonl files (a document a line), .txt files (a document each), or folders of them",
    )
    parser.add_argument("--text-key", default="text", help="key of the text in .jsonl files")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


if __name__ == "__main__":
    run_command(main)
