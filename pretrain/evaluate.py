"""Evaluates a run's checkpoint on any layout, under torchrun or alone.

Prints one JSON object: the NELBO in nats per token with its standard error, its parts by phase, the
perplexity, and with --any-order the bound of the exact likelihood over that many orders.
"""

import argparse
import dataclasses
import json
import logging
import sys
import tempfile
from pathlib import Path

from megatron_eso.config.combinations import check_layout, with_vocabulary
from megatron_eso.config.loading import config_to_toml, load_config, read_config
from megatron_eso.config.sections import Config
from megatron_eso.data.remote.staging import stage_shards
from megatron_eso.data.samples.validation_data import ValidationData
from megatron_eso.errors import ConfigError, UserError, run_command
from megatron_eso.ranks import is_first_rank, launched_world_size
from megatron_eso.runs.run_directory import CONFIG_FILE, RunDirectory
from megatron_eso.runs.steps import find_step, list_checkpoints
from megatron_eso.training.records.log import start_logging


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit code."""
    arguments = parse_command_line(argv)
    start_logging()
    logging.getLogger().setLevel(logging.WARNING)
    try:
        checkpoint = choose_checkpoint(RunDirectory(Path(arguments.run_dir)), arguments.step)
        config, validation = configure(checkpoint, arguments.data, arguments.overrides)
        # Imported once the configuration is known to be sound: importing takes seconds.
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
    parser = argparse.ArgumentParser(prog="python -m pretrain.evaluate", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="such as parallel.tensor_model_parallel_size=2 or validation.num_samples=512",
    )
    parser.add_argument("--step", type=int, help="default: the newest complete checkpoint")
    parser.add_argument("--data", metavar="DIR", help="default: the run's validation shards")
    parser.add_argument("--weights", choices=("ema", "raw"), help="default: ema where there is one")
    parser.add_argument("--any-order", type=int, metavar="K", default=0, help="orders per sample")
    return parser.parse_intermixed_args(argv)


def choose_checkpoint(run: RunDirectory, step: int | None) -> Path:
    """Return the checkpoint of a step, or the newest.

    Raises:
        ConfigError: There is none.
    """
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
    written = read_config(checkpoint / CONFIG_FILE)
    with tempfile.TemporaryDirectory() as folder:
        layer = Path(folder) / "config.toml"
        layer.write_text(config_to_toml(written))
        changes = [f"data.validation={json.dumps(data)}"] if data else []
        loaded = load_config([str(layer), *changes, *overrides])
    config = loaded.config
    check_layout(config, launched_world_size(), loaded.origins)
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


if __name__ == "__main__":
    run_command(main)
