"""One training step, whole: forward and backward over the micro-batches, update, average."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.utils import is_pp_last_stage
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_eso.config.sections import Config
from megatron_eso.objectives.loss import PhaseTokens, normalize_phases, sum_phases
from megatron_eso.randomness.bits import random_bits
from megatron_eso.randomness.purposes import Purpose
from megatron_eso.training.batches import MicroBatch, StepPlan
from megatron_eso.training.optimization.optimizer import update_parameters
from megatron_eso.training.parallel import seed_dropout
from megatron_eso.training.train_state import TrainState

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step says of itself, the same on every rank; losses in nats per token of their phase.

    `loss` is the objective, `loss_diffusion + loss_sequential`; `nelbo` the same with ELBO weights.
    `num_tokens` are the real tokens of the global batch. `bad_ranks` are those whose own part of a
    loss that is not finite is not. `deviations` says how far the loss or the
    gradient norm, whichever is farther, lies above those of the steps before.
    """

    loss: float
    loss_diffusion: float
    loss_sequential: float
    nelbo: float
    grad_norm: float
    learning_rate: float
    skipped: bool
    deviations: float
    num_tokens: int
    bad_ranks: tuple[int, ...]


def train_step(
    config: Config,
    state: TrainState,
    plan: StepPlan,
    groups: ProcessGroupCollection,
    flops_per_token: float,
) -> StepResult:
    """Take one step with the samples of `plan`; collective over the world.

    Args:
        config: The resolved configuration.
        state: Changed in place.
        plan: This rank's micro-batches of the samples that come next.
        groups: Groups of this rank.
        flops_per_token: Counted for every real token, whatever the length of its sample.
    """
    clear_gradients(state)
    # Megatron-Core averages over micro-batches and data-parallel ranks; the loss is a sum.
    scale = len(plan.micro_batches) * groups.dp.size()
    step = partial(
        forward_step,
        tokens=plan.tokens,
        scale=scale,
        dropout_seed=config.run.seed if config.model.hidden_dropout > 0 else None,
        pp_rank=groups.pp.rank(),
    )
    reports = run_schedule(step, state, plan.micro_batches, groups, forward_only=False)
    own_losses = sum_reports(reports)
    losses = reduce_over_world(own_losses.clone(), groups)
    loss, nelbo = float(losses[:2].sum()), float(losses[2:].sum())

    learning_rate = float(state.optimizer.param_groups[0]["lr"])
    limit = config.train.skip_deviations or math.inf

    def accept(grad_norm: float) -> bool:
        return math.isfinite(loss) and measure_deviations(state, loss, grad_norm) <= limit

    grad_norm, applied = update_parameters(state.optimizer, accept)
    deviations = measure_deviations(state, loss, grad_norm)
    state.scheduler.step(1)
    if applied:
        if state.ema is not None:
            state.ema.update()
        state.losses = state.losses.add(loss)
        state.grad_norms = state.grad_norms.add(log_norm(grad_norm))
    num_tokens = plan.tokens.total
    done = state.counters
    state.counters = dataclasses.replace(
        done,
        step=done.step + 1,
        consumed_samples=done.consumed_samples + config.train.global_batch_size,
        tokens=done.tokens + num_tokens,
        flops=done.flops + num_tokens * flops_per_token,
        skipped_steps=done.skipped_steps + (not applied),
        skipped_in_row=0 if applied else done.skipped_in_row + 1,
        spikes=done.spikes + (0 < config.train.spike_deviations <= deviations),
    )
    return StepResult(
        loss=loss,
        loss_diffusion=float(losses[0]),
        loss_sequential=float(losses[1]),
        nelbo=nelbo,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        skipped=not applied,
        deviations=deviations,
        num_tokens=num_tokens,
        bad_ranks=() if math.isfinite(loss) else find_bad_ranks(own_losses),
    )


def clear_gradients(state: TrainState) -> None:
    """Set every gradient to zero, or to none."""
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()


def find_bad_ranks(own_losses: Tensor) -> tuple[int, ...]:
    """The ranks whose own losses are not finite; collective over the world."""
    is_bad = torch.zeros(dist.get_world_size(), device=torch.cuda.current_device())
    is_bad[dist.get_rank()] = float(not own_losses.isfinite().all())
    dist.all_reduce(is_bad)
    return tuple(is_bad.nonzero().flatten().tolist())


def measure_deviations(state: TrainState, loss: float, grad_norm: float) -> float:
    """How far loss or gradient norm, whichever is farther, lies above those of the steps before."""
    return max(state.losses.deviations(loss), state.grad_norms.deviations(log_norm(grad_norm)))


def log_norm(grad_norm: float) -> float:
    """Logarithm of a gradient norm, whose spread is in proportion to its size."""
    return math.log(max(grad_norm, sys.float_info.min)) if math.isfinite(grad_norm) else math.inf


def forward_step(
    micro_batches: Iterator[MicroBatch],
    model: torch.nn.Module,
    *,
    tokens: PhaseTokens,
    scale: int,
    dropout_seed: int | None,
    pp_rank: int,
) -> tuple[Tensor, LossFunction]:
    """One micro-batch through this stage's part of the model, as Megatron-Core's schedules ask."""
    micro_batch = next(micro_batches)
    if dropout_seed is not None:
        chunk = 8192 * (pp_rank + 1024 * (unwrap_model(model).vp_stage or 0))
        words = random_bits(dropout_seed, Purpose.DROPOUT, int(micro_batch.indices.min()), 1)
        seed_dropout(int(words[0] >> np.uint64(33)) + chunk)
    plan = micro_batch.plan.to(torch.device(torch.cuda.current_device()))

    def compute_loss(nll_E: Tensor) -> tuple[Tensor, Tensor]:
        phases = normalize_phases(sum_phases(nll_E, plan.weights_E, plan), tokens)
        with torch.no_grad():
            sums = sum_phases(nll_E.double(), plan.weights_E.double(), plan)
            elbo = sum_phases(nll_E.double(), plan.elbo_weights_E.double(), plan)
            report = torch.cat([normalize_phases(sums, tokens), normalize_phases(elbo, tokens)])
        return phases.sum() * scale, report

    return model(plan), compute_loss


def run_schedule(
    step: Callable[..., tuple[Tensor, Callable[..., Any]]],
    state: TrainState,
    micro_batches: list[MicroBatch],
    groups: ProcessGroupCollection,
    *,
    forward_only: bool,
) -> list[Tensor]:
    """Run Megatron-Core's schedule of this layout; collective over the model-parallel ranks.

    Returns:
        On the last stage what the loss function reported for each micro-batch, elsewhere nothing.
    """
    chunks = state.chunks
    schedule = get_forward_backward_func(
        pp_size=groups.pp.size(), vp_size=len(chunks) if len(chunks) > 1 else None
    )
    reports: list[Tensor] = schedule(
        forward_step_func=step,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(micro_batches),
        # Neither is used: the stages tell each other the number of rows.
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return reports if is_pp_last_stage(groups.pp) else []


def sum_reports(reports: list[Tensor]) -> Tensor:
    """The losses [4] of a step on this rank; zeros on the stages that have none."""
    return torch.stack(reports).sum(0) if reports else torch.zeros(4, dtype=torch.float64)


def reduce_over_world(report: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """Sum a report of the last stages over data-parallel ranks; collective over the world.

    Tensor-parallel ranks hold the same report: one of them counts.
    """
    total = report.to(torch.cuda.current_device())
    if groups.tp.rank() > 0:
        total = torch.zeros_like(total)
    dist.all_reduce(total)
    return total.cpu()
