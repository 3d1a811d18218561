"""Shows where the time and the memory of a training step go.

`--simulate GPU` needs no GPU: the real step of one rank runs on tensors without values, and stated
constants of the GPU and its links give the time. `--plan GPU` proposes a layout. Without either,
steps are timed on this machine, under torchrun or alone.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys

from megatron_eso.command_line import CommandLine, add_layers, count, new_path
from megatron_eso.config.combinations import check_layout, with_vocabulary
from megatron_eso.config.layers import SHIPPED_CONFIGS
from megatron_eso.config.loading import LoadedConfig, load_config
from megatron_eso.config.sections import Config
from megatron_eso.errors import ConfigError, run_command
from megatron_eso.estimates.gpus import GPUS, Gpu
from megatron_eso.ranks import is_first_rank, launched_world_size
from megatron_eso.training.records.log import start_logging


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    arguments = parse_arguments(argv)
    start_logging()
    logging.getLogger().setLevel(logging.WARNING)
    loaded = load_config(arguments.layers, folder=SHIPPED_CONFIGS)
    config = fill_vocabulary(loaded)
    is_measured = not (arguments.simulate or arguments.plan)
    world_size = arguments.world_size or config.parallel.model_parallel_size
    if is_measured:
        world_size = launched_world_size()
    if arguments.plan:  # layouts of its own, whatever that of the configuration
        return print_plan(config, world_size, GPUS[arguments.plan])
    check_layout(config, world_size, loaded.origins)
    if is_measured:
        return measure(config, arguments)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch warns of the fake groups
    # Imported once the configuration is known to be sound: importing takes seconds.
    from megatron_eso.simulation.report import describe_simulation, format_simulation
    from megatron_eso.simulation.simulator import simulate

    simulation = simulate(config, GPUS[arguments.simulate], world_size)
    if arguments.json:
        sys.stdout.write(json.dumps(describe_simulation(simulation), indent=2) + "\n")
    else:
        sys.stdout.write(format_simulation(simulation))
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandLine(prog="python -m pretrain.bench", description=__doc__.split("\n\n")[0])
    add_layers(parser)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--simulate", choices=sorted(GPUS), help="simulate a step on this GPU")
    mode.add_argument("--plan", choices=sorted(GPUS), help="propose a layout for this GPU")
    parser.add_argument("--world-size", type=count(1), help="ranks of the run")
    parser.add_argument(
        "--steps", type=count(1), default=5, help="steps to time, without --simulate and --plan"
    )
    parser.add_argument(
        "--profile",
        type=new_path,
        metavar="TRACE.json",
        help="also trace a step, for Perfetto and TensorBoard, without --simulate and --plan",
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    return parser.parse_intermixed_args(argv)


def measure(config: Config, arguments: argparse.Namespace) -> int:
    """Time steps on this machine and print the figures on rank 0; returns the exit code."""
    # Imported once the configuration is known to be sound: importing takes seconds.
    from megatron_eso.simulation.measurement import format_measurement, measure_steps

    found = measure_steps(config, arguments.steps, arguments.profile)
    if is_first_rank():
        text = json.dumps(dataclasses.asdict(found)) + "\n"
        sys.stdout.write(text if arguments.json else format_measurement(found))
    return 0


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
