"""Shows where the time and the memory of a training step go.

`--simulate GPU` needs no GPU: the real step of one rank runs on tensors without values, and stated
constants of the GPU and its links give the time. `--plan GPU` proposes a layout. Without either,
real steps are measured on the ranks that were launched, under torchrun or alone.
"""

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from megatron_eso.command_line import CommandLine, add_layers, count, new_path
from megatron_eso.config.combinations import check_layout, with_vocabulary
from megatron_eso.config.layers import SHIPPED_CONFIGS
from megatron_eso.config.loading import LoadedConfig, load_config
from megatron_eso.config.sections import Config
from megatron_eso.data.remote.copies import copy_shards
from megatron_eso.errors import ConfigError, run_command
from megatron_eso.estimates.gpus import GPUS, Gpu
from megatron_eso.ranks import is_first_rank, launched_world_size
from megatron_eso.training.records.log import start_logging

WARMUP_STEPS, STEPS = 3, 10


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    arguments = parse_arguments(argv)
    start_logging()
    logging.getLogger().setLevel(logging.WARNING)
    loaded = load_config(arguments.layers, folder=SHIPPED_CONFIGS)
    world_size = arguments.world_size or loaded.config.parallel.model_parallel_size
    if arguments.plan:  # layouts of its own, whatever that of the configuration
        return print_plan(fill_vocabulary(loaded), world_size, GPUS[arguments.plan])
    if arguments.simulate:
        print_simulation(loaded, world_size, arguments)
    else:
        print_measurement(loaded, arguments)
    return 0


def print_simulation(loaded: LoadedConfig, world_size: int, arguments: argparse.Namespace) -> None:
    """Simulate a step and print what it takes."""
    config = fill_vocabulary(loaded)
    check_layout(config, world_size, loaded.origins)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch warns of the fake groups
    # Imported once the configuration is known to be sound: importing takes seconds.
    from megatron_eso.simulation.report import describe_simulation, format_simulation
    from megatron_eso.simulation.simulator import simulate

    simulation = simulate(config, GPUS[arguments.simulate], world_size)
    if arguments.json:
        print_json(describe_simulation(simulation))
    else:
        sys.stdout.write(format_simulation(simulation))


def print_measurement(loaded: LoadedConfig, arguments: argparse.Namespace) -> None:
    """Measure steps and print what they take; collective over the ranks that were launched."""
    check_layout(loaded.config, launched_world_size(), loaded.origins)
    if arguments.profile is not None:
        make_folder(arguments.profile)
    # The data of the run, or a vocabulary to draw tokens from.
    if arguments.real_data:
        # Imported once the configuration is known to be sound: importing takes seconds.
        from pretrain.start import open_inputs

        inputs = open_inputs(loaded)
        config, data = inputs.config, inputs.train
        copy_shards(data.sources)
    else:
        config, data = fill_vocabulary(loaded), None
    from megatron_eso.benchmark.measurement import Request, measure
    from megatron_eso.benchmark.report import describe_measurement, format_measurement

    # The steps, and the figures on rank 0.
    request = Request(
        num_warmup_steps=arguments.warmup_steps or WARMUP_STEPS,
        num_steps=arguments.steps or STEPS,
        trace_folder=arguments.profile,
        data=data,
    )
    measurement = measure(config, request)
    if not is_first_rank():
        return
    if arguments.json:
        print_json(describe_measurement(measurement))
    else:
        sys.stdout.write(format_measurement(measurement))


def print_json(figures: dict[str, Any]) -> None:
    """Print figures by name."""
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


def make_folder(path: Path) -> None:
    """Make the folder of the traces.

    Raises:
        ConfigError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--profile {path}: {error.strerror}; name another folder") from error


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandLine(prog="python -m pretrain.bench", description=__doc__.split("\n\n")[0])
    add_layers(parser)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--simulate", choices=sorted(GPUS), help="simulate a step on this GPU")
    mode.add_argument("--plan", choices=sorted(GPUS), help="propose a layout for this GPU")
    parser.add_argument(
        "--world-size", type=count(1), help="ranks of the run, with --simulate or --plan"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    add_measurement(parser.add_argument_group("without --simulate and --plan"))
    arguments = parser.parse_intermixed_args(argv)
    check_arguments(parser, arguments)
    return arguments


def add_measurement(group: argparse._ArgumentGroup) -> None:
    """Add the arguments of a measurement."""
    group.add_argument(
        "--warmup-steps",
        type=count(1),
        metavar="N",
        help=f"steps before the clock starts (default: {WARMUP_STEPS})",
    )
    group.add_argument(
        "--steps", type=count(1), metavar="N", help=f"steps that are timed (default: {STEPS})"
    )
    group.add_argument(
        "--real-data", action="store_true", help="read data.train; by default tokens are drawn"
    )
    group.add_argument(
        "--profile",
        type=new_path,
        metavar="DIR",
        help="write the trace of a step of each rank, for Perfetto and TensorBoard",
    )


def check_arguments(parser: CommandLine, arguments: argparse.Namespace) -> None:
    """Refuse arguments of a measurement where nothing is measured, and the other way round."""
    if not arguments.simulate and not arguments.plan:
        if arguments.world_size is not None:
            parser.error(
                "--world-size needs --simulate or --plan; to measure on several ranks, start them: "
                "torchrun --nproc-per-node=N -m pretrain.bench"
            )
        return
    mode = "--simulate" if arguments.simulate else "--plan"
    for name in ("warmup_steps", "steps", "real_data", "profile"):
        if getattr(arguments, name):
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} measures real steps: leave it out, or {mode}")


def print_plan(config: Config, world_size: int, gpu: Gpu) -> int:
    """Print the layouts to choose from; returns the exit code."""
    # Imported once the configuration is known to be sound: the objective's rows import torch.
    from megatron_eso.estimates.planner import format_plan, plan_layout
    from megatron_eso.objectives.build import build_objective

    objective = build_objective(config.objective, config.data.vocabulary, seed=config.run.seed)
    plan = plan_layout(config, objective, world_size, gpu)
    sys.stdout.write(format_plan(plan, world_size, gpu))
    return 0 if plan.candidates else 2


def fill_vocabulary(loaded: LoadedConfig) -> Config:
    """Return the configuration with a vocabulary; the mask token is the last one by default.

    Raises:
        ConfigError: The size of the vocabulary is not stated.
    """
    data = loaded.config.data
    if data.vocab_size is None:
        raise ConfigError(
            "data.vocab_size is missing: pass data.vocab_size=N, the tokens of the tokenizer with "
            "the mask token"
        )
    mask_token_id = data.vocab_size - 1 if data.mask_token_id is None else data.mask_token_id
    return with_vocabulary(
        loaded.config,
        vocab_size=data.vocab_size,
        mask_token_id=mask_token_id,
        source="data.vocab_size",
        origins=loaded.origins,
    )


if __name__ == "__main__":
    run_command(main)
