"""Pretrains an Eso-LM, under torchrun or alone.

Resumes by itself from the newest complete checkpoint of the run directory. `--dry-run` prints what
would be trained, on what layout and in how much memory, and exits.
"""

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

from megatron_eso.config.combinations import check_layout, with_vocabulary
from megatron_eso.config.loading import LoadedConfig, load_config
from megatron_eso.config.sections import Config
from megatron_eso.config.shipped import SHIPPED_CONFIGS
from megatron_eso.data.remote.folder import is_remote
from megatron_eso.data.remote.staging import stage_shards
from megatron_eso.data.samples.training_data import TrainingData, open_run_data
from megatron_eso.data.samples.validation_data import ValidationData
from megatron_eso.errors import ConfigError, UserError, run_command
from megatron_eso.ranks import is_first_rank, launched_world_size
from megatron_eso.training.records.log import start_logging
from megatron_eso.training.records.wandb_log import check_wandb

logger = logging.getLogger("pretrain")


def main(argv: list[str] | None = None) -> int:
    """Train, or print what would be trained; returns the exit code."""
    arguments = parse_arguments(argv)
    try:
        loaded = load_config(arguments.layers, folder=SHIPPED_CONFIGS)
        check_wandb(loaded.config.run.wandb_project)
        if arguments.dry_run:
            print_plan(loaded, arguments.world_size)
            return 0
        check_layout(loaded.config, launched_world_size(), loaded.origins)
        train_data, validation_data, config = open_data(loaded)
        start_logging()
        for warning in loaded.warnings:
            logger.warning("%s", warning)
        stage_shards(train_data.sources + (validation_data.sources if validation_data else []))
        # Imported once the configuration is known to be sound: importing takes seconds.
        from megatron_eso.training.job import run_job
        from pretrain.initial_weights import convert_initial_weights

        run_job(config, train_data, validation_data, convert_initial_weights)
    except UserError as error:
        if is_first_rank():
            raise
        return error.exit_code
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.train", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "layers",
        nargs="+",
        metavar="CONFIG.toml|section.key=value",
        help="configuration layers in order; the later value of a key wins",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and exit")
    parser.add_argument(
        "--world-size", type=int, default=None, help="ranks to plan for (with --dry-run)"
    )
    return parser.parse_intermixed_args(argv)


def print_plan(loaded: LoadedConfig, world_size: int | None) -> None:
    """Print what would be trained, and of which shares, where the shards are on this machine."""
    # Imported once the configuration is known to be sound: the objective's rows import torch.
    from megatron_eso.estimates.dry_run import format_dry_run

    samples = ""
    if all(Path(corpus).is_dir() for corpus in loaded.config.data.train_corpora):
        train_data, _, config = open_data(loaded)
        loaded = dataclasses.replace(loaded, config=config)
        samples = f"# samples: {train_data.describe()}\n"
    sys.stdout.write(format_dry_run(loaded, world_size) + "\n" + samples)


def open_data(loaded: LoadedConfig) -> tuple[TrainingData, ValidationData | None, Config]:
    """Open the shards, and complete the configuration by their vocabulary."""
    data, config = loaded.config.data, loaded.config
    named = [("data.train", corpus) for corpus in data.train_corpora]
    named += [("data.validation", data.validation)] if data.validation else []
    for key, folder in named:
        if not is_remote(folder) and not Path(folder).is_dir():
            origin = loaded.origins.get(key, "default")
            raise ConfigError(
                f"{origin}: {key} = {folder}: there is no such folder; build the shards with "
                f"python -m data_tools build"
            )
    train, validation = open_run_data(config.data, config.run.seed)
    config = with_vocabulary(
        config,
        vocab_size=train.vocabulary.size,
        mask_token_id=train.vocabulary.mask_token_id,
        source=data.train_corpora[0],
        origins=loaded.origins,
    )
    return train, validation, config


if __name__ == "__main__":
    run_command(main)
