"""Evaluates a run's checkpoint on any layout, under torchrun or alone.

Prints one JSON object: the NELBO in nats per token with its standard error, its parts by phase, the
perplexity, and with --any-order the bound of the exact likelihood over that many orders.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_eso.config.combinations import check_layout, with_vocabulary
from megatron_eso.config.loading import config_to_toml, load_config, read_config
from megatron_eso.config.sections import Config
from megatron_eso.data.remote.staging import stage_shards
from megatron_eso.data.samples.validation_data import ValidationData
from megatron_eso.errors import CheckpointError, ConfigError, UserError, run_command
from megatron_eso.objectives.loss import to_perplexity
from megatron_eso.runs.checkpoint import PREFIXES
from megatron_eso.runs.checkpoint_state import read_state
from megatron_eso.runs.run_directory import CONFIG_FILE, RunDirectory
from megatron_eso.runs.steps import find_step, list_checkpoints
from pretrain.train import start_logging


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit code."""
    arguments = parse_arguments(argv)
    rank = int(os.environ.get("RANK", "0"))
    start_logging(rank)
    logging.getLogger().setLevel(logging.WARNING)
    try:
        checkpoint = choose_checkpoint(RunDirectory(Path(arguments.run_dir)), arguments.step)
        config, validation = configure(checkpoint, arguments.data, arguments.overrides)
        answer = evaluate_checkpoint(
            checkpoint, config, validation, arguments.weights, arguments.any_order
        )
    except UserError as error:
        if rank == 0:
            raise
        return error.exit_code
    if rank == 0:
        sys.stdout.write(json.dumps(answer) + "\n")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
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
    check_layout(config, int(os.environ.get("WORLD_SIZE", "1")), loaded.origins)
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


def evaluate_checkpoint(
    checkpoint: Path,
    config: Config,
    validation: ValidationData,
    weights: str | None,
    num_orders: int,
) -> dict[str, Any]:
    """Load the weights on this layout and evaluate them; collective over the world."""
    from megatron_eso.training.cpu_backend import install_cpu_backend

    install_cpu_backend()
    from megatron_eso.objectives.build import build_objective
    from megatron_eso.training.batches import ValidationBatches
    from megatron_eso.training.checkpointing.restore import refuse_damage
    from megatron_eso.training.checkpointing.state import load_weights
    from megatron_eso.training.evaluation import evaluate, evaluate_orders
    from megatron_eso.training.parallel import model_parallel_groups, process_group
    from megatron_eso.training.train_state import build_train_state

    record = read_state(checkpoint)
    if record.data is not None:  # a conversion's has none
        validation.check_tokenizer(record.data["tokenizer"])
    has_ema = record.ema_updates is not None
    weights = weights or ("ema" if has_ema else "raw")
    if weights == "ema" and not has_ema:
        raise CheckpointError(f"{checkpoint}: holds no EMA weights; use --weights raw")
    # The weights that are evaluated stand alone: no average is kept beside them.
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, ema_decay=0.0)
    )
    with process_group(), model_parallel_groups(config.parallel) as groups:
        state = build_train_state(config, groups)
        refuse_damage(checkpoint)
        load_weights(checkpoint, state, prefix=PREFIXES["ema" if weights == "ema" else "param"])
        mask_token_id = config.data.vocabulary.mask_token_id
        objective = build_objective(
            config.objective, seed=config.run.seed, mask_token_id=mask_token_id
        )
        batches = ValidationBatches(config, objective, validation)
        estimate = evaluate(state, batches, groups, use_ema=False)
        answer = {
            "step": record.counters.step,
            "weights": weights,
            "num_samples": batches.num_samples,
            "nelbo": estimate.nelbo,
            "nelbo_stderr": estimate.standard_error,
            "perplexity": estimate.perplexity,
            **{f"nelbo_{phase}": value for phase, value in estimate.phases.items()},
        }
        if num_orders > 0:
            nats = evaluate_orders(state, batches, groups, num_orders)
            answer |= {
                "any_order_orders": num_orders,
                "any_order_nats_per_token": nats,
                "any_order_perplexity": to_perplexity(nats),
            }
    return answer


if __name__ == "__main__":
    run_command(main)
