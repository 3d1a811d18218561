"""Evaluates a run's checkpoint on any layout, under torchrun or alone.

Prints one JSON object: the NELBO in nats per token with its standard error, its parts by phase, the
perplexity, and with --any-order the bound of the exact likelihood over that many orders.
"""

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

from megatron_eso.command_line import CommandLine, count, existing_path
from megatron_eso.config.combinations import check_config, check_layout, with_vocabulary
from megatron_eso.config.loading import OVERRIDE, build_config, read_config
from megatron_eso.config.origins import COMMAND_LINE, Origins, refuse_value
from megatron_eso.config.sections import KEYS, Config
from megatron_eso.config.values import check_value, parse_override
from megatron_eso.data.remote.datasets import existing_location
from megatron_eso.data.remote.staging import stage_shards
from megatron_eso.data.samples.validation_data import ValidationData
from megatron_eso.errors import ConfigError, UserError, run_command
from megatron_eso.ranks import is_first_rank, launched_world_size
from megatron_eso.runs.run_directory import CONFIG_FILE, RunDirectory
from megatron_eso.runs.steps import find_step, is_checkpoint, list_checkpoints
from megatron_eso.training.records.log import start_logging


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit code."""
    arguments = parse_command_line(argv)
    start_logging()
    logging.getLogger().setLevel(logging.WARNING)
    try:
        checkpoint = choose_checkpoint(arguments.run_dir, arguments.step)
        config, validation = configure(checkpoint, arguments.data, arguments.overrides)
        # Imported once the configuration is known to be sound: importing takes seconds.
        from megatron_eso.training.distributed.cpu_backend import install_cpu_backend

        install_cpu_backend()
        from megatron_eso.training.checkpoint_evaluation import evaluate_checkpoint

        answer = evaluate_checkpoint(
            checkpoint, config, validation, arguments.weights, arguments.any_order
        )
    except UserError as error:
        if is_first_rank():
            raise
        return error.exit_code
    if is_first_rank():
        sys.stdout.write(json.dumps(answer) + "\n")
    return 0


def parse_command_line(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandLine(prog="python -m pretrain.evaluate", description=__doc__)
    parser.add_argument(
        "run_dir",
        type=existing_path,
        metavar="RUN_DIR",
        help="a run directory, or one of its checkpoints/step_XXXXXXXX",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="such as parallel.tensor_model_parallel_size=2 or validation.num_samples=512",
    )
    parser.add_argument("--step", type=count(), help="default: the newest complete checkpoint")
    parser.add_argument(
        "--data", type=existing_location, metavar="DIR", help="default: the run's validation shards"
    )
    parser.add_argument("--weights", choices=("ema", "raw"), help="default: ema where there is one")
    parser.add_argument(
        "--any-order", type=count(1), metavar="K", default=0, help="orders per sample"
    )
    return parser.parse_intermixed_args(argv)


def choose_checkpoint(path: Path, step: int | None) -> Path:
    """Return the checkpoint of a step, by default the newest.

    Args:
        path: A run directory, or one of its `step_XXXXXXXX` folders.
        step: Of a checkpoint of the run.

    Raises:
        ConfigError: There is none.
    """
    if step is None and is_checkpoint(path):
        return path
    run = RunDirectory(path)
    found = find_step(run.checkpoints, step)
    if found is None:
        what = "no complete checkpoint" if step is None else f"no checkpoint of step {step}"
        names = ", ".join(path.name for path in list_checkpoints(run.checkpoints)) or "none"
        raise ConfigError(f"{run.path}: {what}; there are: {names}")
    return found


def configure(
    checkpoint: Path, data: str | None, overrides: list[str]
) -> tuple[Config, ValidationData]:
    """The checkpoint's configuration with the overrides, and the shards to evaluate on.

    Raises:
        ConfigError: They do not fit each other or the number of ranks.
    """
    source = checkpoint / CONFIG_FILE
    written = read_config(source)
    config, origins = override(written, str(source), data, overrides)
    _check_layout(config, origins)
    validation = ValidationData.open(config.data)
    if validation is None:
        raise ConfigError("data.validation is not set in the run: name shards with --data DIR")
    stage_shards(validation.sources)
    config = with_vocabulary(
        dataclasses.replace(config, model=written.model),
        vocab_size=validation.vocabulary.size,
        mask_token_id=validation.vocabulary.mask_token_id,
        source=str(config.data.validation),
    )
    return config, validation


def override(
    written: Config, source: str, data: str | None, overrides: list[str]
) -> tuple[Config, Origins]:
    """Return a configuration with other values, and where each was set.

    Raises:
        ConfigError: An override is none, changes the model, or does not fit the rest.
    """
    values: dict[str, Any] = {key: written.get(key) for key in KEYS if written.get(key) is not None}
    origins = dict.fromkeys(values, source)
    changes: dict[str, Any] = {"data.validation": data} if data is not None else {}
    for argument in overrides:
        match = OVERRIDE.fullmatch(argument)
        if match is None:
            raise ConfigError(f"{COMMAND_LINE}: {argument}: is not section.key=value")
        changes[match["key"]] = parse_override(match["key"], match["text"])
    for key, value in changes.items():
        values[key] = check_value(key, value, COMMAND_LINE)
        if key.startswith("model."):
            refuse_value(
                COMMAND_LINE, key, value, f"the model is that of {source}; leave the key out"
            )
        origins[key] = COMMAND_LINE
    config = build_config(values, source)
    check_config(config, origins)
    return config, origins


def _check_layout(config: Config, origins: Origins) -> None:
    """Refuse a layout that the ranks do not divide into, with the hint that others do."""
    num_ranks = launched_world_size()
    try:
        check_layout(config, num_ranks, origins)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; or evaluate on another layout than the run's: any one reads the checkpoint, "
            "such as parallel.tensor_model_parallel_size=1 "
            "parallel.pipeline_model_parallel_size=1"
        ) from None


if __name__ == "__main__":
    run_command(main)
