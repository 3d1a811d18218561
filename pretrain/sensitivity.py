"""Measures how far the likelihood of a checkpoint depends on the order of generation.

Measures exact likelihoods in orders that the run may not have trained on, and for schedules that
generate 2, 4, 8 ... tokens in a step; NELBOs at other values of alpha_0 or block_size. Runs on any
layout, under torchrun or alone. Prints a table, and writes sensitivity.json and sensitivity.svg to
the run directory. Objectives: eso_lm, set_dlm, any_order_ar, bd3_lm.
"""

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_eso.command_line import CommandLine
from megatron_eso.config.loading import read_config
from megatron_eso.errors import ConfigError, run_command
from megatron_eso.files import is_wrong_path, write_json, write_text
from megatron_eso.ranks import is_first_rank
from megatron_eso.runs.run_directory import CONFIG_FILE
from megatron_eso.sensitivity.report import Likelihood, draw_chart, format_table, to_json
from megatron_eso.sensitivity.schedules import check_objective
from megatron_eso.training.records.log import start_logging
from pretrain.evaluate import add_checkpoint, choose_checkpoint, configure


def main(argv: list[str] | None = None) -> None:
    """Measure, and report on rank 0; collective over the ranks that were launched.

    Raises:
        ConfigError: The command line, the layout or the objective is wrong.
        CheckpointError: The checkpoint is damaged.
        DataError: The validation shards are missing or damaged.
    """
    arguments = parse_command_line(argv)
    start_logging()
    logging.getLogger().setLevel(logging.WARNING)
    checkpoint = choose_checkpoint(arguments.run_dir, arguments.step)
    source = checkpoint / CONFIG_FILE
    check_objective(read_config(source).objective, str(source))
    config, validation = configure(checkpoint, arguments.data, arguments.overrides)
    # Imported after the configuration is checked: the import takes seconds.
    from megatron_eso.training.distributed.cpu_backend import install_cpu_backend
    from megatron_eso.training.distributed.device import prepare_device

    prepare_device(config)
    install_cpu_backend()
    from megatron_eso.training.checkpoint_sensitivity import measure_checkpoint

    head, likelihoods = measure_checkpoint(checkpoint, config, validation, arguments.weights)
    if is_first_rank():
        answer = to_json(head, likelihoods)
        sys.stdout.write(json.dumps(answer) + "\n" if arguments.json else format_table(likelihoods))
        write_report(checkpoint.parents[1], answer, likelihoods)


def parse_command_line(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandLine(prog="python -m pretrain.sensitivity", description=__doc__)
    add_checkpoint(parser)
    parser.add_argument(
        "--json", action="store_true", help="print the content of sensitivity.json, not the table"
    )
    return parser.parse_intermixed_args(argv)


def write_report(run: Path, answer: Mapping[str, Any], likelihoods: Sequence[Likelihood]) -> None:
    """Write `sensitivity.json` and `sensitivity.svg` to a run directory.

    Raises:
        ConfigError: This user may not write there.
    """
    title = f"step {answer['step']:,}, {answer['objective']}, {answer['num_samples']} samples"
    try:
        write_json(run / "sensitivity.json", answer)
        write_text(run / "sensitivity.svg", draw_chart(title, likelihoods))
    except OSError as error:
        if not is_wrong_path(error):
            raise
        raise ConfigError(f"{run}: {error.strerror}; the report is written there") from None


if __name__ == "__main__":
    run_command(main)
