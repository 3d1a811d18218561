"""Small training runs on ranks: steps from a checkpoint to the next, schedules, damage."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from megatron_eso.config.sections import Config
from megatron_eso.data.samples.training_data import TrainingData
from megatron_eso.data.samples.validation_data import ValidationData
from megatron_eso.training.checkpointing.checkpoints import Checkpoints
from megatron_eso.training.checkpointing.restore import restore
from megatron_eso.training.distributed.parallel import model_parallel_groups
from megatron_eso.training.optimization.optimizer import build_scheduler
from megatron_eso.training.steps.batches import TrainingBatches, ValidationBatches
from megatron_eso.training.steps.prefetch import StepPrefetcher
from megatron_eso.training.steps.step import StepResult, train_step
from megatron_eso.training.steps.train_state import build_train_state
from tests.support.planning import objective_of
from tests.support.training import (
    Overrides,
    tiny_config,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run gave: numbers of every step, and the folder of its last checkpoint."""

    losses: list[float]
    grad_norms: list[float]
    checkpoint: Path


def train_tiny(run: Path, data: Path, overrides: Overrides, num_steps: int) -> Trained:
    """Train until `num_steps` steps are taken, from the newest checkpoint if there is one; save."""
    config = tiny_config(run, data, overrides)
    losses, grad_norms = [], []
    with model_parallel_groups(config.parallel) as groups:
        batches = open_batches(config, groups.dp.size())
        state = build_train_state(config, groups)
        checkpoints = Checkpoints(run / "checkpoints", config.checkpoint, batches)
        restore(state, config, checkpoints)
        prefetcher = StepPrefetcher(batches, groups.dp.rank(), config.data.prefetch_steps)
        with prefetcher:
            while state.counters.step < num_steps:
                result = take_step(config, state, batches, groups, prefetcher)
                losses.append(result.loss)
                grad_norms.append(result.grad_norm)
        checkpoint = checkpoints.save(state, config, groups)
    return Trained(losses=losses, grad_norms=grad_norms, checkpoint=checkpoint)


def open_batches(config: Config, data_parallel_size: int) -> Any:
    """Open the batches of a small run, with its objective."""
    data = TrainingData.open(config.data, config.run.seed)
    return TrainingBatches(
        objective_of(config),
        data,
        config.train,
        data_parallel_size=data_parallel_size,
        row_multiple=config.parallel.row_multiple,
    )


def open_held_out(config: Config) -> Any:
    """Open the validation batches of a small run."""
    data = ValidationData.open(config.data)
    assert data is not None
    objective, multiple = objective_of(config), config.parallel.row_multiple
    return ValidationBatches(objective, data, config.validation, row_multiple=multiple)


def take_step(config: Config, state: Any, batches: Any, groups: Any, prefetcher: Any = None) -> Any:
    """One training step from where the state stands; its batch is planned now, or taken."""
    step = batches.step(state.counters.step, state.counters.consumed_samples)
    return train_step(
        state,
        prefetcher.take(step) if prefetcher else batches.plan_step(step, groups.dp.rank()),
        batches.objective,
        config.train,
        groups,
        flops_per_token=1.0,
        dropout_seed=config.run.seed if config.model.hidden_dropout > 0 else None,
    )


def list_learning_rates(run: Path, data: Path, overrides: Overrides) -> Any:
    """List the rate of every step of a run, and the rate of a run that resumes in the middle."""
    config = tiny_config(run, data, overrides)
    with model_parallel_groups(config.parallel) as groups:
        state = build_train_state(config, groups)
        rates = []
        for _ in range(config.train.num_steps):
            rates.append(state.optimizer.param_groups[0]["lr"])
            state.scheduler.step(1)
        schedule = build_scheduler(config.optimizer, config.train.num_steps, state.optimizer)
        schedule.step(config.train.num_steps // 2)
        return rates, state.optimizer.param_groups[0]["lr"]


def resave(run: Path, data: Path, overrides: Overrides, to: Path) -> None:
    """Load the run's newest checkpoint on this layout and write it again."""
    config = tiny_config(run, data, overrides)
    with model_parallel_groups(config.parallel) as groups:
        batches = open_batches(config, groups.dp.size())
        state = build_train_state(config, groups)
        restore(state, config, Checkpoints(run / "checkpoints", config.checkpoint, batches))
        Checkpoints(to, config.checkpoint, batches).save(state, config, groups)


def train_through_damage(run: Path, data: Path, overrides: Overrides, rank: int) -> Any:
    """Two good steps with one in between whose gradient is damaged on one rank."""
    config = tiny_config(run, data, overrides)
    damage = torch.distributed.get_rank() == rank

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, math.nan)

    with model_parallel_groups(config.parallel) as groups:
        batches = open_batches(config, groups.dp.size())
        state = build_train_state(config, groups)
        weight = next(p for p in state.parameters if "linear_fc2.weight" in p.sharded.key).model

        def take_next_step() -> StepResult:
            return take_step(config, state, batches, groups)

        # A step, and the weights after it.
        results = [take_next_step()]
        before = [p.main.detach().clone() for p in state.parameters if p.main is not None]
        # A step with a damaged gradient on one rank changes nothing.
        hook = weight.register_hook(spoil) if damage else None
        results.append(take_next_step())
        if hook is not None:
            hook.remove()
        mains = [p.main for p in state.parameters if p.main is not None]
        unchanged = all(torch.equal(a, b) for a, b in zip(before, mains, strict=True))
        assert state.ema is not None
        updates_while_damaged = state.ema.num_updates
        results.append(take_next_step())
        changed = any(not torch.equal(a, b) for a, b in zip(before, mains, strict=True))
    skipped = [result.skipped for result in results]
    return skipped, unchanged, changed, updates_while_damaged, state.counters, results[2].loss
