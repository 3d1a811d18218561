"""`python -m megatron_eso.sampler sample | score SAMPLER_DIR`: generation and exact likelihood."""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eso.data.tokenizers.tokenizer import Tokenizer, has_tokenizer
from megatron_eso.errors import CheckpointError, ConfigError, DataError, run_command
from megatron_eso.sampler.model import EsoLM

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
GENERATION_FILE = "generation_config.json"


def load_tokenizer(directory: str, model: EsoLM) -> Tokenizer | None:
    """The tokenizer of a sampler directory; None where it has none.

    Raises:
        DataError: it is damaged, or not the model's.
    """
    if not has_tokenizer(directory):
        return None
    tokenizer = Tokenizer.load(directory)
    ours = tokenizer.vocab_size, tokenizer.mask_token_id
    network = model.config.vocab_size, model.config.mask_token_id
    if ours != network:
        raise DataError(
            f"{directory}: the tokenizer has {ours[0]} tokens and the mask token {ours[1]}, the "
            f"network {network[0]} and {network[1]}; put the network's tokenizer there, or none"
        )
    return tokenizer


def run_sample(args: argparse.Namespace) -> None:
    """Generate texts; without a tokenizer, token ids."""
    model = load_model(args)
    tokenizer = load_tokenizer(args.sampler_dir, model)
    defaults = read_defaults(args.sampler_dir)
    prompt = None
    if args.prompt is not None:
        if tokenizer is None:
            raise ConfigError(f"--prompt: {args.sampler_dir} has no tokenizer; leave it out")
        prompt = build_prompt(model, tokenizer.encode(args.prompt), args.num_samples, args.length)
    options: dict[str, Any] = {
        name: defaults.get(name) if value is None else value
        for name, value in (
            ("alpha_0", args.alpha_0),
            ("steps", args.steps),
            ("temperature", args.temperature),
            ("top_p", args.top_p),
        )
    }
    try:
        out = model.generate(
            args.num_samples,
            prompt=prompt,
            length=None if prompt is not None else args.length,
            seed=args.seed,
            **options,
        )
    except ValueError as error:
        raise ConfigError(f"sample: {error}") from None
    for number, sequence in enumerate(out.sequences.tolist(), start=1):
        text = " ".join(map(str, sequence)) if tokenizer is None else tokenizer.decode(sequence)
        sys.stdout.write(f"--- sample {number} of {args.num_samples}, {out.nfe} forward passes\n")
        sys.stdout.write(text + "\n")


def read_defaults(directory: str) -> dict[str, Any]:
    """The content of `generation_config.json`; without the file the model's own defaults."""
    path = Path(directory) / GENERATION_FILE
    if not path.is_file():
        return {"temperature": 1.0, "top_p": 1.0}
    try:
        return {"temperature": 1.0, "top_p": 1.0, **json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: no valid JSON ({error}); convert again") from None


def build_prompt(model: EsoLM, ids: list[int], num_samples: int, length: int | None) -> Tensor:
    """int64 `[N, T]`: the prompt's tokens, then mask tokens up to `length`."""
    length = model.config.max_length if length is None else length
    if len(ids) > length:
        raise ConfigError(
            f"--prompt: has {len(ids)} tokens, more than the {length} of a sample; shorten it"
        )
    row = ids + [model.config.mask_token_id] * (length - len(ids))
    return torch.tensor([row] * num_samples)


def run_score(args: argparse.Namespace) -> None:
    """Print exact log-likelihoods of texts, left to right, a JSON object a line, and the total."""
    model = load_model(args)
    tokenizer = load_tokenizer(args.sampler_dir, model)
    sums, counts = 0.0, 0
    for path in args.input or ["-"]:
        for name, ids in read_texts(path, args.text_key, tokenizer, args.sampler_dir):
            if max(ids, default=0) >= model.config.vocab_size or min(ids, default=0) < 0:
                raise DataError(f"{name}: a token is not in 0..{model.config.vocab_size - 1}")
            log_likelihood = score_tokens(model, ids, args.batch_size)
            sums, counts = sums + log_likelihood, counts + len(ids)
            print_score(name, len(ids), log_likelihood)
    print_score("total", counts, sums)


def read_texts(
    path: str, text_key: str, tokenizer: Tokenizer | None, directory: str
) -> Iterator[tuple[str, list[int]]]:
    """Yield names and token ids: of a whole text file, or of each line of a .jsonl file.

    A line holds a text, or the list of its ids under `tokens`.
    """
    try:
        content = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if not path.endswith(".jsonl"):
        yield path, encode(content, tokenizer, directory)
        return
    for number, line in enumerate(content.splitlines(), start=1):
        name = f"{path}:{number}"
        try:
            record = json.loads(line)
            tokens = record.get("tokens")
            ids = encode(record[text_key], tokenizer, directory) if tokens is None else list(tokens)
            if not all(type(token) is int for token in ids):
                raise TypeError("tokens is no list of integers")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{name}: no JSON object with a text under {text_key!r} or ids under 'tokens' "
                f"({error})"
            ) from None
        yield name, ids


def encode(text: str, tokenizer: Tokenizer | None, directory: str) -> list[int]:
    """Ids of a text."""
    if tokenizer is None:
        raise DataError(f"{directory}: has no tokenizer; give .jsonl with ids under 'tokens'")
    return tokenizer.encode(text)


def score_tokens(model: EsoLM, ids: list[int], batch_size: int) -> float:
    """Log-likelihood in nats; a text longer than `max_length` is scored in windows of it."""
    length = model.config.max_length
    num_whole = len(ids) // length
    whole = torch.tensor(ids[: num_whole * length], dtype=torch.int64).reshape(num_whole, length)
    rest = torch.tensor([ids[num_whole * length :]], dtype=torch.int64)
    total = 0.0
    for batch in (*torch.split(whole, batch_size), rest):
        if batch.numel():
            order = torch.arange(batch.shape[1]).expand_as(batch).contiguous()
            scores = model.log_likelihood(batch.to(model.device), order.to(model.device))
            total += float(scores.sum())
    return total


def print_score(name: str, num_tokens: int, log_likelihood: float) -> None:
    """Print one line."""
    nats = -log_likelihood / num_tokens if num_tokens else float("nan")
    record = {
        "name": name,
        "tokens": num_tokens,
        "log_likelihood": log_likelihood,
        "nats_per_token": nats,
        "perplexity": math.exp(nats) if nats < 700 else math.inf,
    }
    sys.stdout.write(json.dumps(record) + "\n")


def load_model(args: argparse.Namespace) -> EsoLM:
    """The model on the chosen device."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {args.device}: no CUDA device is there; use cpu")
    return EsoLM.from_pretrained(args.sampler_dir, dtype=DTYPES[args.dtype], device=args.device)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m megatron_eso.sampler", description=__doc__)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("sample", help=run_sample.__doc__)
    _add_common(command)
    command.add_argument("--num-samples", type=int, default=1, metavar="N")
    command.add_argument("--length", type=int, help="tokens of a sample; default: max_length")
    command.add_argument("--prompt", metavar="TEXT", help="how each sample begins")
    command.add_argument("--steps", type=int, help="time steps of the diffusion phase")
    command.add_argument("--alpha-0", type=float, help="share of tokens that diffusion reveals")
    command.add_argument("--temperature", type=float)
    command.add_argument("--top-p", type=float)
    command.add_argument("--seed", type=int)
    command.set_defaults(run=run_sample)

    command = commands.add_parser("score", help=run_score.__doc__)
    _add_common(command)
    command.add_argument(
        "input", nargs="*", metavar="FILE", help="text, or .jsonl; - or none: text from stdin"
    )
    command.add_argument("--text-key", default="text", help="of .jsonl; default %(default)s")
    command.add_argument("--batch-size", type=int, default=8)
    command.set_defaults(run=run_score)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("sampler_dir", metavar="SAMPLER_DIR")
    command.add_argument("--dtype", choices=DTYPES, default="float32")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    args = build_parser().parse_args(argv)
    if getattr(args, "batch_size", 1) < 1:
        raise ConfigError(f"--batch-size {args.batch_size}: is not 1 or more")
    args.run(args)


if __name__ == "__main__":
    run_command(main)
