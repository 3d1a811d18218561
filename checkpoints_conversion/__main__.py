"""Converts and compares checkpoints of training, sampler, the reference and Hugging Face."""

import argparse
import logging
import sys
from pathlib import Path

import torch

from checkpoints_conversion.conversions import (
    convert_from_official,
    convert_to_megatron,
    convert_to_sampler,
    verify_checkpoints,
)
from checkpoints_conversion.from_hugging_face import convert_from_hugging_face
from checkpoints_conversion.official import OfficialOptions
from checkpoints_conversion.to_hugging_face import convert_to_hugging_face
from checkpoints_conversion.verify import Comparison
from megatron_eso.command_line import (
    CommandLine,
    count,
    existing_path,
    new_path,
    real_from_0,
)
from megatron_eso.errors import run_command
from megatron_eso.sampler.network.objective_fields import OBJECTIVE_FIELDS

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
OFFICIAL_OPTIONS = (
    *("objective", "variant", "num_heads", "length"),
    *("block_size", "set_size", "max_set_size"),
)


def run_to_sampler(args: argparse.Namespace) -> None:
    """Convert a distributed checkpoint of any layout to a sampler directory."""
    done = convert_to_sampler(
        args.run_dir,
        args.out_dir,
        step=args.step,
        weights=args.weights,
        dtype=DTYPES[args.dtype],
    )
    _say(
        f"{done.directory}: step {done.step}, {done.weights} weights, "
        f"{done.num_parameters} parameters"
    )


def run_from_official(args: argparse.Namespace) -> None:
    """Convert an official checkpoint to a sampler directory."""
    done = convert_from_official(
        args.ckpt,
        args.out_dir,
        weights=args.weights,
        tokenizer=args.tokenizer,
        mask_token_id=args.mask_token_id,
        options=OfficialOptions(**{name: getattr(args, name) for name in OFFICIAL_OPTIONS}),
    )
    step = "" if done.step is None else f"step {done.step}, "
    _say(f"{done.directory}: {step}{done.weights} weights, {done.num_parameters} parameters")


def run_to_megatron(args: argparse.Namespace) -> None:
    """Convert a sampler directory to a run directory that training starts from."""
    done = convert_to_megatron(args.sampler_dir, args.run_dir)
    _say(
        f"{done.directory}: {done.num_parameters} parameters; to start training from it, set "
        f"checkpoint.init_from={done.directory}"
    )


def run_from_hf(args: argparse.Namespace) -> None:
    """Convert a Llama, Qwen2 or Qwen3 directory to an `ar` sampler directory."""
    done = convert_from_hugging_face(
        args.directory, args.out_dir, tokenizer=args.tokenizer, seed=args.seed
    )
    _say(f"{done.directory}: {done.num_parameters} parameters, a mask token included")


def run_to_hf(args: argparse.Namespace) -> None:
    """Export an `ar` sampler directory to a Llama, Qwen2 or Qwen3 directory."""
    done = convert_to_hugging_face(args.sampler_dir, args.out_dir)
    _say(f"{done.directory}: {done.weights} weights, {done.num_parameters} parameters")


def run_verify(args: argparse.Namespace) -> int:
    """Compare two checkpoints of any kind; exit code 1 if they differ."""
    comparison = verify_checkpoints(
        args.a, args.b, step=args.step, weights=args.weights, mask_token_id=args.mask_token_id
    )
    return report(comparison, (args.a, args.b), args.tolerance)


def report(comparison: Comparison, paths: tuple[Path, Path], tolerance: float) -> int:
    """Print a comparison, and return the exit code: 0 for the same network, else 1."""
    # What does not match.
    for side, path, loaded in zip("AB", paths, comparison.sides, strict=True):
        _say(
            f"{side}: {path}: {loaded.kind}, {loaded.weights} weights, {loaded.num_tensors} tensors"
        )
    for title, lines in (
        ("configurations differ", comparison.config_differences),
        ("tensors in A only", comparison.only_in_a),
        ("tensors in B only", comparison.only_in_b),
        ("shapes differ", comparison.shape_differences),
    ):
        for line in lines:
            _say(f"{title}: {line}")
    # How far the values differ.
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


def build_command_line() -> CommandLine:
    """Build the parser; each command sets `run`, which takes the parsed arguments."""
    parser = CommandLine(prog="python -m checkpoints_conversion", description=__doc__)
    commands = parser.add_subparsers(required=True)
    kinds = ("ema", "raw")

    # To a sampler directory.
    command = commands.add_parser("to-sampler", help=run_to_sampler.__doc__)
    command.add_argument("run_dir", type=existing_path, metavar="RUN_DIR")
    command.add_argument("out_dir", type=new_path, metavar="OUT_DIR")
    command.add_argument("--step", type=count(), help="default: the newest complete checkpoint")
    command.add_argument("--weights", choices=kinds, help="default: ema where there is one")
    command.add_argument("--dtype", choices=DTYPES, default="float32")
    command.set_defaults(run=run_to_sampler)

    _add_from_official(commands.add_parser("from-official", help=run_from_official.__doc__))

    _add_hugging_face(commands)

    # To a run directory.
    command = commands.add_parser("to-megatron", help=run_to_megatron.__doc__)
    command.add_argument("sampler_dir", type=existing_path, metavar="SAMPLER_DIR")
    command.add_argument("run_dir", type=new_path, metavar="RUN_DIR")
    command.set_defaults(run=run_to_megatron)

    # The comparison.
    command = commands.add_parser("verify", help=run_verify.__doc__)
    command.add_argument("a", type=existing_path, metavar="A")
    command.add_argument("b", type=existing_path, metavar="B")
    command.add_argument(
        "--step", type=count(), help="step of run directories; default: the newest"
    )
    command.add_argument(
        "--weights", choices=kinds, help="default: those of the sampler directory, else ema"
    )
    command.add_argument(
        "--mask-token-id", type=count(), metavar="N", help="mask token of official checkpoints"
    )
    command.add_argument(
        "--tolerance",
        type=real_from_0,
        default=1e-4,
        help="largest difference of logits in equal networks (default: %(default)s)",
    )
    command.set_defaults(run=run_verify)
    return parser


def _add_hugging_face(commands: "argparse._SubParsersAction[CommandLine]") -> None:
    # From transformers.
    command = commands.add_parser("from-hf", help=run_from_hf.__doc__)
    command.add_argument("directory", type=existing_path, metavar="DIR")
    command.add_argument("out_dir", type=new_path, metavar="OUT_DIR")
    command.add_argument(
        "--tokenizer",
        type=existing_path,
        metavar="PATH",
        help="tokenizer's file or directory to copy (default: that in DIR)",
    )
    command.add_argument(
        "--seed",
        type=count(),
        default=0,
        metavar="N",
        help="seed of the mask token's row (default: %(default)s)",
    )
    command.set_defaults(run=run_from_hf)
    # Back.
    command = commands.add_parser("to-hf", help=run_to_hf.__doc__)
    command.add_argument("sampler_dir", type=existing_path, metavar="SAMPLER_DIR")
    command.add_argument("out_dir", type=new_path, metavar="OUT_DIR")
    command.set_defaults(run=run_to_hf)


def _add_from_official(command: CommandLine) -> None:
    # The checkpoint and its weights.
    command.add_argument("ckpt", type=existing_path, metavar="CKPT")
    command.add_argument("out_dir", type=new_path, metavar="OUT_DIR")
    command.add_argument("--weights", choices=("ema", "raw"), default="ema")
    command.add_argument(
        "--tokenizer",
        type=existing_path,
        metavar="PATH",
        help="tokenizer's file or directory to copy (default: none)",
    )
    command.add_argument(
        "--mask-token-id",
        type=count(),
        metavar="N",
        help="default: the tokenizer's, else the last row of the embedding",
    )
    # What the checkpoint may not state.
    command.add_argument(
        "--objective", choices=OBJECTIVE_FIELDS, help="default: that of the checkpoint"
    )
    command.add_argument("--variant", choices=("a", "b"), help="default: that of the checkpoint")
    for option, meaning in {
        "--num-heads": "attention heads; needed for a bare backbone (.safetensors)",
        "--length": "largest number of positions; needed for a bare backbone",
        "--block-size": "positions in a block of bd3_lm (default: the length)",
        "--set-size": "mean number of tokens in a set of set_dlm",
        "--max-set-size": "largest number of tokens in a set of set_dlm",
    }.items():
        command.add_argument(option, type=count(1), metavar="N", help=meaning)
    command.set_defaults(run=run_from_official)


def main(argv: list[str] | None = None) -> int | None:
    """Run one command."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    args = build_command_line().parse_args(argv)
    code: int | None = args.run(args)
    return code


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    run_command(main)
