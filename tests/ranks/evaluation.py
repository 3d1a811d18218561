"""Validation on ranks."""

from pathlib import Path
from typing import Any

from megatron_eso.training.checkpointing.checkpoints import Checkpoints
from megatron_eso.training.checkpointing.restore import restore
from megatron_eso.training.distributed.parallel import model_parallel_groups
from megatron_eso.training.steps.evaluation import evaluate
from megatron_eso.training.steps.train_state import build_train_state
from tests.ranks.training import open_batches, open_held_out, take_step
from tests.support.training import Overrides, tiny_config


def evaluate_tiny(run: Path, data: Path, overrides: Overrides) -> tuple[Any, Any, Path]:
    """Evaluate average and weights of the newest checkpoint, save the state again elsewhere."""
    config = tiny_config(run, data, overrides)
    with model_parallel_groups(config.parallel) as groups:
        batches = open_batches(config, groups.dp.size())
        state = build_train_state(config, groups)
        restore(state, config, Checkpoints(run / "checkpoints", config.checkpoint, batches))
        held_out = open_held_out(config)
        ema = evaluate(state, held_out, groups, use_ema=True)
        raw = evaluate(state, held_out, groups, use_ema=False)
        take_step(config, state, batches, groups)
        evaluated = Checkpoints(run / "evaluated", config.checkpoint, batches)
        after = evaluated.save(state, config, groups)
    return ema, raw, after
