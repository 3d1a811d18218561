"""`python -m checkpoints_conversion to-sampler | from-official | to-megatron | verify`."""

import argparse
import logging
import sys
from pathlib import Path

import torch

from checkpoints_conversion.official import (
    describe_official,
    fold_official,
    infer_config,
    read_official,
)
from checkpoints_conversion.run_network import open_checkpoint, read_network, write_run_directory
from checkpoints_conversion.sampler_directory import write_sampler_directory
from checkpoints_conversion.verify import Comparison, compare, load_any, recorded_weights
from megatron_eso.data.tokenizers.tokenizer import Tokenizer, has_tokenizer
from megatron_eso.errors import ConfigError, run_command
from megatron_eso.sampler.directory import build_network, read_description, read_weights
from megatron_eso.sampler.layers_eso_lm import NetworkConfig

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def convert_to_sampler(args: argparse.Namespace) -> None:
    """A distributed checkpoint of any layout to a sampler directory."""
    checkpoint = open_checkpoint(args.run_dir, args.step)
    config, tensors, description = read_network(checkpoint, args.weights)
    build_network(config, tensors, torch.float32, "cpu")  # refuses shapes that do not fit
    write_sampler_directory(
        args.out_dir,
        description,
        tensors,
        dtype=DTYPES[args.dtype],
        tokenizer=checkpoint.tokenizer,
    )
    weights = description["source"]["weights"]
    _say(f"{args.out_dir}: step {checkpoint.step}, {weights} weights, {_count(tensors)} parameters")


def convert_from_official(args: argparse.Namespace) -> None:
    """An official Lightning checkpoint to a sampler directory."""
    official = read_official(args.ckpt, args.weights)
    tokenizer = None if args.tokenizer is None else Path(args.tokenizer)
    vocab_size = len(official.tensors["vocab_embed.embedding"])
    config = infer_config(official, choose_mask_token(args.mask_token_id, tokenizer, vocab_size))
    description = describe_official(official, config)
    tensors = fold_official(official)
    build_network(config, tensors, torch.float32, "cpu")  # refuses shapes that do not fit
    write_sampler_directory(
        args.out_dir,
        description,
        tensors,
        dtype=torch.float32,
        tokenizer=tokenizer,
    )
    _say(
        f"{args.out_dir}: step {official.step}, {args.weights} weights, "
        f"{_count(tensors)} parameters"
    )


def choose_mask_token(told: int | None, tokenizer: Path | None, vocab_size: int) -> int | None:
    """The mask token that the command line names, or else that of a tokenizer of this size."""
    if told is None and tokenizer is not None and has_tokenizer(tokenizer):
        loaded = Tokenizer.load(tokenizer)
        return loaded.mask_token_id if loaded.vocab_size == vocab_size else None
    return told


def convert_to_megatron(args: argparse.Namespace) -> None:
    """A sampler directory to a run directory that training starts from."""
    description = read_description(args.sampler_dir)
    tensors = {name: tensor.float() for name, tensor in read_weights(args.sampler_dir).items()}
    build_network(NetworkConfig.from_dict(description), tensors, torch.float32, "cpu")
    write_run_directory(args.run_dir, description, tensors, Path(args.sampler_dir))
    _say(f"{args.run_dir}: {_count(tensors)} parameters; start from it by checkpoint.init_from")


def verify(args: argparse.Namespace) -> int:
    """Compare two checkpoints; 1 if they differ."""
    # The default is EMA where there is one; a directory of raw weights asks for raw ones.
    is_raw = "raw" in (recorded_weights(args.a), recorded_weights(args.b))
    weights = args.weights or ("raw" if is_raw else None)
    options = {"step": args.step, "weights": weights, "mask_token_id": args.mask_token_id}
    a, b = load_any(args.a, **options), load_any(args.b, **options)
    for side, path, loaded in (("A", args.a, a), ("B", args.b, b)):
        _say(
            f"{side}: {path}: {loaded.kind}, {loaded.weights} weights, "
            f"{len(loaded.tensors)} tensors"
        )
    comparison = compare(a, b)
    return report(comparison, args.tolerance)


def report(comparison: Comparison, tolerance: float) -> int:
    """Print a comparison and return the exit code."""
    for title, lines in (
        ("configurations differ", comparison.config_differences),
        ("tensors in A only", comparison.only_in_a),
        ("tensors in B only", comparison.only_in_b),
        ("shapes differ", comparison.shape_differences),
    ):
        for line in lines:
            _say(f"{title}: {line}")
    worst = max(
        comparison.tensor_errors, key=lambda name: comparison.tensor_errors[name], default=""
    )
    equal = sum(error == 0 for error in comparison.tensor_errors.values())
    _say(f"tensors: {equal} of {len(comparison.tensor_errors)} equal bit for bit in value")
    if worst:
        _say(f"tensors: largest difference {comparison.tensor_errors[worst]:.3g} in {worst}")
    for phase, error in comparison.logits_errors.items():
        _say(f"logits, {phase} phase: largest difference {error:.3g}, tolerance {tolerance:.3g}")
    is_close = all(error <= tolerance for error in comparison.logits_errors.values())
    same = comparison.matches and is_close
    _say("the same network" if same else "NOT the same network")
    return 0 if same else 1


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m checkpoints_conversion", description=__doc__)
    commands = parser.add_subparsers(required=True)
    kinds = ("ema", "raw")

    command = commands.add_parser("to-sampler", help=convert_to_sampler.__doc__)
    command.add_argument("run_dir", metavar="RUN_DIR")
    command.add_argument("out_dir", metavar="OUT_DIR")
    command.add_argument("--step", type=int, help="default: the latest complete checkpoint")
    command.add_argument("--weights", choices=kinds, help="default: ema where there is one")
    command.add_argument("--dtype", choices=DTYPES, default="float32")
    command.set_defaults(run=convert_to_sampler)

    command = commands.add_parser("from-official", help=convert_from_official.__doc__)
    command.add_argument("ckpt", metavar="CKPT")
    command.add_argument("out_dir", metavar="OUT_DIR")
    command.add_argument("--weights", choices=kinds, default="ema")
    command.add_argument("--tokenizer", metavar="PATH", help="file or directory; none by default")
    command.add_argument(
        "--mask-token-id", type=int, metavar="N", help="default: the tokenizer's, else the last row"
    )
    command.set_defaults(run=convert_from_official)

    command = commands.add_parser("to-megatron", help=convert_to_megatron.__doc__)
    command.add_argument("sampler_dir", metavar="SAMPLER_DIR")
    command.add_argument("run_dir", metavar="RUN_DIR")
    command.set_defaults(run=convert_to_megatron)

    command = commands.add_parser("verify", help=verify.__doc__)
    command.add_argument("a", metavar="A")
    command.add_argument("b", metavar="B")
    command.add_argument("--step", type=int, help="of run directories; default: the latest")
    command.add_argument(
        "--weights", choices=kinds, help="default: as the sampler directory says, else ema"
    )
    command.add_argument("--mask-token-id", type=int, metavar="N", help="of official checkpoints")
    command.add_argument(
        "--tolerance", type=float, default=1e-4, help="of the logits; default %(default)s"
    )
    command.set_defaults(run=verify)
    return parser


def main(argv: list[str] | None = None) -> int | None:
    """Run one command."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    args = build_parser().parse_args(argv)
    if getattr(args, "step", None) is not None and args.step < 0:
        raise ConfigError(f"--step {args.step}: is negative; give the step of a checkpoint")
    code: int | None = args.run(args)
    return code


def _count(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    run_command(main)
