"""Generates texts from a sampler directory, or computes exact likelihoods of texts."""

import argparse
import json
import sys

import torch

from megatron_eso.command_line import CommandLine, count, existing_path, real
from megatron_eso.errors import run_command

from .texts import TextModel, TextScore

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def load_model(args: argparse.Namespace) -> TextModel:
    """Load the model that the command line names, on its device."""
    return TextModel.load(str(args.sampler_dir), DTYPES[args.dtype], args.device)


def run_sample(args: argparse.Namespace) -> None:
    """Generate texts; without a tokenizer, token ids."""
    options = {name: getattr(args, name) for name in ("alpha_0", "steps", "temperature", "top_p")}
    out = load_model(args).sample(args.num_samples, args.prompt, args.length, args.seed, options)
    for number, text in enumerate(out.texts, start=1):
        sys.stdout.write(f"--- sample {number} of {args.num_samples}, {out.nfe} forward passes\n")
        sys.stdout.write(text + "\n")


def run_score(args: argparse.Namespace) -> None:
    """Print exact left-to-right log-likelihoods of texts, one JSON object each, and their total."""
    model = load_model(args)
    log_likelihood, num_tokens = 0.0, 0
    for path in args.input or ["-"]:
        for score in model.score(path, args.text_key, args.batch_size):
            log_likelihood += score.log_likelihood
            num_tokens += score.num_tokens
            print_score(score)
    print_score(TextScore(name="total", num_tokens=num_tokens, log_likelihood=log_likelihood))


def print_score(score: TextScore) -> None:
    """Print the score of a text as one line of JSON."""
    record = {
        "name": score.name,
        "tokens": score.num_tokens,
        "log_likelihood": score.log_likelihood,
        "nats_per_token": score.nats_per_token,
        "perplexity": score.perplexity,
    }
    sys.stdout.write(json.dumps(record, allow_nan=False) + "\n")


def build_parser() -> CommandLine:
    """Build the parser; each command sets `run`, which takes the parsed arguments."""
    parser = CommandLine(prog="python -m megatron_eso.sampler", description=__doc__)
    commands = parser.add_subparsers(required=True)

    # Generation.
    command = commands.add_parser("sample", help=run_sample.__doc__)
    _add_common(command)
    command.add_argument("--num-samples", type=count(1), default=1, metavar="N")
    command.add_argument("--length", type=count(1), help="tokens of a sample (default: max_length)")
    command.add_argument("--prompt", metavar="TEXT", help="text with which each sample begins")
    command.add_argument(
        "--steps", type=count(1), help="time steps of the diffusion, or intervals of the sets"
    )
    command.add_argument(
        "--alpha-0", type=real, help="share of tokens that the diffusion phase reveals (eso_lm)"
    )
    command.add_argument("--temperature", type=real)
    command.add_argument("--top-p", type=real)
    command.add_argument("--seed", type=count(0, 2**64 - 1))
    command.set_defaults(run=run_sample)

    # Likelihoods.
    command = commands.add_parser(
        "score",
        help=run_score.__doc__,
        description=f"{run_score.__doc__} A text longer than the model's max_length is cut into "
        "windows of max_length tokens; each is scored by itself, without the text before it.",
    )
    _add_common(command)
    command.add_argument(
        "input",
        type=_text_file,
        nargs="*",
        metavar="FILE",
        help="text or .jsonl, also as .gz or .zst; - or no file: text from stdin",
    )
    command.add_argument(
        "--text-key", default="text", help="key of the text in .jsonl (default: %(default)s)"
    )
    command.add_argument("--batch-size", type=count(1), default=8)
    command.set_defaults(run=run_score)
    return parser


def _text_file(text: str) -> str:
    """Return the path of a file that exists, or `-`."""
    return text if text == "-" else str(existing_path(text))


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("sampler_dir", type=existing_path, metavar="SAMPLER_DIR")
    command.add_argument("--dtype", choices=DTYPES, default="float32")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def main(argv: list[str] | None = None) -> None:
    """Run one command.

    Raises:
        ConfigError: A value of the command line is wrong.
        CheckpointError: The sampler directory is damaged.
        DataError: The tokenizer or a text is missing or damaged.
    """
    args = build_parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run_command(main)
