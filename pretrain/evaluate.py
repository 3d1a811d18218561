"""Evaluates a checkpoint of a run on any layout, under torchrun or alone.

Prints one JSON object: the NELBO in nats per token with its standard error, its parts by phase, the
perplexity, and with --any-order K the likelihood bound over K random orders per sample.
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
from megatron_eso.data.remote.copies import copy_shards
from megatron_eso.data.remote.datasets import existing_location
from megatron_eso.data.samples.validation_data import ValidationData
from megatron_eso.errors import ConfigError, run_command
from megatron_eso.ranks import is_first_rank, launched_world_size
from megatron_eso.runs.run_directory import CONFIG_FILE, RunDirectory
from megatron_eso.runs.steps import find_step, is_checkpoint, list_checkpoints
from megatron_eso.training.records.log import start_logging


def main(argv: list[str] | None = None) -> None:
    """Evaluate, and print the result on rank 0; collective over the ranks that were launched.

    Raises:
        ConfigError: The command line or the layout is wrong.
        CheckpointError: The checkpoint is damaged.
        DataError: The validation shards are missing or damaged.
    """
    arguments = parse_command_line(argv)
    start_logging()
    logging.getLogger().setLevel(logging.WARNING)
    checkpoint = choose_checkpoint(arguments.run_dir, arguments.step)
    config, validation = configure(checkpoint, arguments.data, arguments.overrides)
    # Imported after the configuration is checked: the import takes seconds.
    from megatron_eso.training.distributed.cpu_backend import install_cpu_backend
    from megatron_eso.training.distributed.device import prepare_device

    prepare_device(config)
    install_cpu_backend()
    from megatron_eso.training.checkpoint_evaluation import evaluate_checkpoint

    answer = evaluate_checkpoint(
        checkpoint, config, validation, arguments.weights, arguments.any_order
    )
    if is_first_rank():
        sys.stdout.write(json.dumps(answer) + "\n")


def parse_command_line(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandLine(prog="python -m pretrain.evaluate", description=__doc__)
    add_checkpoint(parser)
    parser.add_argument(
        "--any-order",
        type=count(1),
        metavar="K",
        default=0,
        help="random orders per sample for the likelihood bound (default: no bound)",
    )
    return parser.parse_intermixed_args(argv)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a checkpoint, its weights, the layout and the data."""
    # Which checkpoint, on which layout.
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
        help="such as parallel.tensor_model_parallel_size=2 or validation.num_samples=512; the "
        "model's keys are those of the run",
    )
    parser.add_argument(
        "--step", type=count(), help="step (default: that of the newest complete checkpoint)"
    )
    # The weights, and the data.
    parser.add_argument(
        "--data",
        type=existing_location,
        metavar="DIR",
        help="shards (default: the run's data.validation)",
    )
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="default: ema where the checkpoint has it"
    )


def choose_checkpoint(path: Path, step: int | None) -> Path:
    """Return the checkpoint of a step, by default the newest.

    Args:
        path: A run directory, or one of its `step_XXXXXXXX` folders.
        step: Step of the checkpoint; None takes the newest.

    Raises:
        ConfigError: The run has no such checkpoint.
    """
    if step is None and is_checkpoint(path):
        return path
    run = RunDirectory(path)
    found = find_step(run.checkpoints, step)
    if found is None:
        what = "no complete checkpoint" if step is None else f"no checkpoint of step {step}"
        names = ", ".join(path.name for path in list_checkpoints(run.checkpoints)) or "none"
        raise ConfigError(f"{run.path}: has {what}; complete checkpoints: {names}")
    return found


def configure(
    checkpoint: Path, data: str | None, overrides: list[str]
) -> tuple[Config, ValidationData]:
    """Return the checkpoint's configuration with the overrides, and the validation data.

    Args:
        checkpoint: Folder of the checkpoint.
        data: Location of the validation shards; None: those of the run.
        overrides: Values as `section.key=value`.

    Raises:
        ConfigError: The values do not fit each other or the number of ranks.
        DataError: The shards are missing or damaged.
    """
    source = checkpoint / CONFIG_FILE
    written = read_config(source)
    config, origins = override(written, str(source), data, overrides)
    _check_layout(config, origins)
    validation = ValidationData.open(config.data)
    if validation is None:
        raise ConfigError(f"{source}: data.validation is not set; name shards by --data DIR")
    copy_shards(validation.sources)
    config = with_vocabulary(
        dataclasses.replace(config, model=written.model),
        vocab_size=validation.vocabulary.size,
        mask_token_id=validation.vocabulary.mask_token_id,
        bos_token_id=validation.vocabulary.bos_token_id,
        source=str(config.data.validation),
    )
    return config, validation


def override(
    written: Config, source: str, data: str | None, overrides: list[str]
) -> tuple[Config, Origins]:
    """Return a configuration with other values, and the origin of each value.

    Args:
        written: The configuration of the checkpoint.
        source: File of that configuration.
        data: Location of the validation shards; None: those of the run.
        overrides: Values as `section.key=value`.

    Raises:
        ConfigError: An override is malformed, changes the model, or does not fit the other values.
    """
    values: dict[str, Any] = {key: written.get(key) for key in KEYS if written.get(key) is not None}
    origins = dict.fromkeys(values, source)
    changes: dict[str, Any] = {"data.validation": data} if data is not None else {}
    for argument in overrides:
        match = OVERRIDE.fullmatch(argument)
        if match is None:
            raise ConfigError(f"{COMMAND_LINE}: {argument}: is not of the form section.key=value")
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
    """Refuse a layout that does not fit the number of ranks, and name one that does."""
    num_ranks = launched_world_size()
    try:
        check_layout(config, num_ranks, origins)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; or choose another layout, since any layout reads the checkpoint: "
            "parallel.tensor_model_parallel_size=1 parallel.pipeline_model_parallel_size=1"
        ) from None


if __name__ == "__main__":
    run_command(main)
