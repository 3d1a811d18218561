"""Batches on ranks: compared between ranks, and the largest one tried."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_eso.errors import DataError
from megatron_eso.training.distributed.parallel import model_parallel_groups
from megatron_eso.training.guards.batch_check import check_batches
from megatron_eso.training.guards.dry_batch import explain_shortage, run_largest_batch
from megatron_eso.training.steps.train_state import build_train_state
from tests.ranks.training import open_batches, take_step
from tests.support.training import TINY, Overrides, tiny_config

BATCH = TINY["train.global_batch_size"]
STEP, SAMPLE = 2, 2 * BATCH  # the step's first sample, which data-parallel rank 0 trains on


def compare_steps(run: Path, data_by_rank: Path, overrides: Overrides) -> list[str]:
    """Return what each check of the first steps reports on this rank."""
    config = tiny_config(run, data_by_rank / str(dist.get_rank()), overrides)
    messages = []
    with model_parallel_groups(config.parallel) as groups:
        batches = open_batches(config, groups.dp.size())
        for step in range(STEP + 2):
            plan = batches.plan_step(batches.step(step, step * BATCH), groups.dp.rank())
            try:
                check_batches(step, plan.micro_batches, groups)
                messages.append("")
            except DataError as error:
                messages.append(str(error))
    return messages


def run_dry(run: Path, data: Path, overrides: Overrides, tries: bool) -> tuple[Any, ...]:
    """Return the state before and after a dry batch, and after two more steps."""

    def copy(state: Any) -> list[torch.Tensor]:
        tensors = [parameter.model for parameter in state.parameters]
        tensors += [p.main for p in state.parameters if p.main is not None]
        tensors += [each for each in state.ema.averages if each is not None]
        tensors += [p.model.main_grad for p in state.parameters if hasattr(p.model, "main_grad")]
        for p in state.parameters:
            if p.main is not None:
                tensors += list(p.inner.state[p.main].values())
        return [tensor.detach().clone() for tensor in tensors]

    config = tiny_config(run, data, overrides)
    with model_parallel_groups(config.parallel) as groups:
        batches = open_batches(config, groups.dp.size())
        state = build_train_state(config, groups)
        before, counters = copy(state), state.counters
        if tries:
            run_largest_batch(state, batches, groups, dropout_seed=config.run.seed)
        assert state.counters == counters
        after = copy(state)
        losses = []
        for _ in range(2):
            losses.append(take_step(config, state, batches, groups).loss)
        return before, after, losses, copy(state)


def raise_shortage(run: Path, data: Path, overrides: Overrides) -> str:
    """Return the error of a rank whose memory does not suffice."""
    config = tiny_config(run, data, overrides)
    with model_parallel_groups(config.parallel) as groups:
        batches = open_batches(config, groups.dp.size())
        return str(explain_shortage(batches, config.train, config.parallel, 2**32))
