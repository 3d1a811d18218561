"""Pretrains an Eso-LM, under torchrun or alone.

A run resumes from the newest complete checkpoint of its directory. `--dry-run` prints model, layout
and memory of the run, and exits.
"""

import argparse
import dataclasses
import logging
import sys
from contextlib import suppress
from pathlib import Path

from megatron_eso.command_line import CommandLine, add_layers, count, share
from megatron_eso.config.combinations import check_layout
from megatron_eso.config.layers import SHIPPED_CONFIGS
from megatron_eso.config.loading import LoadedConfig, load_config
from megatron_eso.config.origins import TracedConfig
from megatron_eso.data.remote.copies import copy_shards
from megatron_eso.errors import UserError, run_command
from megatron_eso.estimates.gpus import DEFAULT_MFU, GPUS
from megatron_eso.ranks import launched_world_size
from megatron_eso.runs.restarts import write_failure
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.training.records.log import start_logging
from megatron_eso.training.records.wandb_log import check_wandb

logger = logging.getLogger("pretrain")


def main(argv: list[str] | None = None) -> int:
    """Train, or print the plan of the run; return the exit code."""
    arguments = parse_arguments(argv)
    loaded = load_config(arguments.layers, folder=SHIPPED_CONFIGS)
    if arguments.dry_run:
        check_wandb(TracedConfig(config=loaded.config, origins=loaded.origins))
        print_plan(loaded, arguments.world_size, arguments.gpu, arguments.mfu)
        return 0
    try:
        train(loaded)
    except UserError as error:
        record_failure(loaded.config.run.directory, error)
        raise
    return 0


def train(loaded: LoadedConfig) -> None:
    """Check what the run needs, and train; collective over the launched ranks."""
    check_wandb(TracedConfig(config=loaded.config, origins=loaded.origins))
    check_layout(loaded.config, launched_world_size(), loaded.origins)
    # Imported after the check of the configuration, since the import takes seconds.
    from pretrain.start import open_inputs

    inputs = open_inputs(loaded)
    start_logging()
    for warning in loaded.warnings:
        logger.warning("%s", warning)
    validation = inputs.validation
    copy_shards(inputs.train.sources + (validation.sources if validation else []))
    from megatron_eso.training.distributed.cpu_backend import install_cpu_backend
    from megatron_eso.training.distributed.device import prepare_device

    prepare_device(inputs.config)
    install_cpu_backend()
    from megatron_eso.training.job import run_job
    from pretrain.initial_weights import convert_initial_weights

    run_job(inputs.config, inputs.train, validation, convert_initial_weights)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandLine(prog="python -m pretrain.train", description=__doc__.split("\n\n")[0])
    add_layers(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and exit")
    parser.add_argument(
        "--world-size", type=count(1), default=None, help="ranks to plan for (with --dry-run)"
    )
    parser.add_argument(
        "--gpu", choices=sorted(GPUS), help="GPU that the run has to fit (with --dry-run)"
    )
    parser.add_argument(
        "--mfu",
        type=share,
        default=DEFAULT_MFU,
        help="model FLOPs utilization that the hours are counted with (with --dry-run --gpu)",
    )
    return parser.parse_intermixed_args(argv)


def print_plan(
    loaded: LoadedConfig, world_size: int | None, gpu_name: str | None, mfu: float
) -> None:
    """Print the plan of the run, then raise what the start of the run would raise."""
    # Imported after the check of the configuration, since the import of torch takes seconds.
    from megatron_eso.estimates.dry_run import check_fit, format_dry_run
    from pretrain.start import list_unreachable, open_inputs

    samples, refusal = "", None
    try:
        unreachable = list_unreachable(loaded)
        if unreachable:
            samples = "".join(f"# warning: {warning}\n" for warning in unreachable)
        else:
            inputs = open_inputs(loaded)
            loaded = dataclasses.replace(loaded, config=inputs.config)
            samples = f"# samples: {inputs.train.describe()}\n"
    except UserError as error:
        refusal = error
    # A run can be planned before its data are built: the estimates come before the refusal.
    gpu = GPUS[gpu_name] if gpu_name else None
    sys.stdout.write(format_dry_run(loaded, world_size, gpu, mfu) + "\n" + samples)
    sys.stdout.flush()
    if refusal is not None:
        raise refusal
    if gpu is not None:
        check_fit(loaded.config, world_size, gpu)


def record_failure(directory: str, error: UserError) -> None:
    """Write `failure.json` for the job script, if the folder can be written to."""
    with suppress(OSError):
        write_failure(RunDirectory(Path(directory)).failure, error)


if __name__ == "__main__":
    run_command(main)
