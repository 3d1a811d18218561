"""Evaluates a checkpoint on any layout."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_eso.batches.loss import to_perplexity
from megatron_eso.config.sections import Config
from megatron_eso.data.samples.validation_data import ValidationData
from megatron_eso.errors import CheckpointError
from megatron_eso.objectives.build import build_objective
from megatron_eso.runs.checkpoint import PREFIXES
from megatron_eso.runs.checkpoint_state import CheckpointState, read_checkpoint_state
from megatron_eso.training.checkpointing.restore import refuse_damage
from megatron_eso.training.checkpointing.state import load_weights
from megatron_eso.training.distributed.parallel import (
    find_timeout,
    model_parallel_groups,
    process_group,
)
from megatron_eso.training.steps.batches import ValidationBatches
from megatron_eso.training.steps.evaluation import evaluate, evaluate_orders
from megatron_eso.training.steps.train_state import TrainState, build_empty_state


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedCheckpoint:
    """The weights of a checkpoint on these ranks, and the validation set.

    Attributes:
        step: The step of the checkpoint.
        weights: `ema` or `raw`.
        batches: The validation set.
        state: The model with these weights.
        groups: The groups of this rank.
    """

    step: int
    weights: str
    batches: ValidationBatches
    state: TrainState
    groups: ProcessGroupCollection


def evaluate_checkpoint(
    checkpoint: Path,
    config: Config,
    validation: ValidationData,
    weights: str | None,
    num_orders: int,
) -> dict[str, Any]:
    """Load the weights on this layout and evaluate them; collective over the world.

    Args:
        checkpoint: A checkpoint of any layout.
        config: The model and objective of the checkpoint, and the layout of these ranks.
        validation: The shards to evaluate on.
        weights: `ema` or `raw`; by default EMA if the checkpoint has it.
        num_orders: Orders for the bound of the likelihood; 0: no bound.

    Returns:
        The JSON object that the command prints.

    Raises:
        CheckpointError: The checkpoint is damaged, or lacks these weights.
        DataError: The shards are of another tokenizer.
    """
    with load_checkpoint(checkpoint, config, validation, weights) as loaded:
        state, batches, groups = loaded.state, loaded.batches, loaded.groups
        estimate = evaluate(state, batches, groups, use_ema=False)
        answer = {
            "step": loaded.step,
            "weights": loaded.weights,
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


@contextmanager
def load_checkpoint(
    checkpoint: Path, config: Config, validation: ValidationData, weights: str | None
) -> Iterator[LoadedCheckpoint]:
    """Start the process groups, and load weights and validation set; collective over the world.

    Args:
        checkpoint: A checkpoint of any layout.
        config: The model and objective of the checkpoint, and the layout of these ranks.
        validation: The shards to evaluate on.
        weights: `ema` or `raw`; by default EMA if the checkpoint has it.

    Raises:
        CheckpointError: The checkpoint is damaged, or lacks these weights.
        DataError: The shards are of another tokenizer.
    """
    record = read_checkpoint_state(checkpoint)
    weights = choose_weights(checkpoint, record, validation, weights)
    objective = build_objective(config.objective, config.data.vocabulary, seed=config.run.seed)
    batches = ValidationBatches(
        objective, validation, config.validation, row_multiple=config.parallel.row_multiple
    )
    timeout = find_timeout(config.watchdog)
    with process_group(timeout), model_parallel_groups(config.parallel) as groups:
        yield LoadedCheckpoint(
            step=record.counters.step,
            weights=weights,
            batches=batches,
            state=load_state(checkpoint, config, weights, groups),
            groups=groups,
        )


def choose_weights(
    checkpoint: Path, record: CheckpointState, validation: ValidationData, weights: str | None
) -> str:
    """Return `ema` or `raw`, and check that the shards fit the checkpoint.

    Args:
        checkpoint: The checkpoint.
        record: Its `state.json`.
        validation: The shards to evaluate on.
        weights: `ema` or `raw`; None: EMA if the checkpoint has it.

    Raises:
        CheckpointError: The checkpoint lacks these weights.
        DataError: The shards are of another tokenizer.
    """
    if record.data is not None:  # a converted checkpoint has none
        validation.check_tokenizer(record.data["tokenizer"])
    has_ema = record.ema_updates is not None
    weights = weights or ("ema" if has_ema else "raw")
    if weights == "ema" and not has_ema:
        raise CheckpointError(f"{checkpoint}: holds no EMA weights; use --weights raw")
    return weights


def load_state(
    checkpoint: Path, config: Config, weights: str, groups: ProcessGroupCollection
) -> TrainState:
    """Load the raw or EMA weights of a checkpoint, and nothing else; collective over the world."""
    # An evaluation has no moving average of its weights.
    optimizer = dataclasses.replace(config.optimizer, ema_decay=0.0)
    state = build_empty_state(dataclasses.replace(config, optimizer=optimizer), groups)
    refuse_damage(checkpoint)
    load_weights(checkpoint, state, prefix=PREFIXES["ema" if weights == "ema" else "param"])
    return state
