"""Takes a training step: forward and backward over the micro-batches, update, moving average."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import tee
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.utils import is_pp_last_stage
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_eso.batches.loss import normalize_phases, sum_phases
from megatron_eso.batches.rows import MicroBatch
from megatron_eso.config.sections import TrainConfig
from megatron_eso.objectives.objective import Objective
from megatron_eso.randomness.bits import random_bits
from megatron_eso.randomness.purposes import Purpose
from megatron_eso.training.distributed.parallel import seed_dropout
from megatron_eso.training.optimization.gradients import apply_gradients, measure_gradients
from megatron_eso.training.steps.batches import StepPlan
from megatron_eso.training.steps.train_state import TrainState

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """The result of a step, equal on all ranks; losses in nats per token of their phase.

    Attributes:
        loss: The loss of the objective.
        nelbo: The loss with the weights of the NELBO.
        losses: The objective's part of each phase, by the phase's name.
        grad_norm: The norm of the whole gradient before clipping.
        learning_rate: The learning rate of this step's update.
        skipped: Whether the update was not applied.
        deviations: By how many standard deviations the loss or the gradient norm lies above those
            of the previous steps; the larger of the two.
        num_tokens: The number of real tokens in the global batch.
        bad_ranks: If the loss is not finite, the ranks whose own part of it is not finite.
        requests: The largest value of each request over all ranks.
    """

    loss: float
    nelbo: float
    losses: Mapping[str, float]
    grad_norm: float
    learning_rate: float
    skipped: bool
    deviations: float
    num_tokens: int
    bad_ranks: tuple[int, ...]
    requests: tuple[int, ...] = ()


def request_nothing() -> tuple[int, ...]:
    """Return no requests."""
    return ()


def train_step(
    state: TrainState,
    plan: StepPlan,
    objective: Objective,
    config: TrainConfig,
    groups: ProcessGroupCollection,
    *,
    flops_per_token: float,
    dropout_seed: int | None,
    read_requests: Callable[[], tuple[int, ...]] = request_nothing,
) -> StepResult:
    """Take one step with the samples of `plan`; collective over the world.

    Args:
        state: The state, changed in place.
        plan: This rank's micro-batches of the next samples.
        objective: The objective, which combines the losses of the phases.
        config: The section `train`: limits of an update, and the batch size.
        groups: The groups of this rank.
        flops_per_token: FLOPs that are counted for each real token.
        dropout_seed: The run's seed; None without dropout.
        read_requests: Returns this rank's requests, numbers from 0 on that have no part in the step
            and whose largest values over all ranks come without a further wait.
    """
    # Forward and backward.
    clear_gradients(state)
    own_losses = run_micro_batches(state, plan, objective, groups, dropout_seed)
    state.optimizer.prepare_grads()

    # Losses and gradient norm of all ranks: the one time that the host waits for the GPU.
    own_gradients = measure_gradients(state.optimizer, groups)
    losses, grad_norm, requests = reduce_step(own_losses, own_gradients, read_requests(), groups)
    losses_P, elbo_P = losses.chunk(2)
    loss, nelbo = float(objective.combine(losses_P)), float(objective.combine(elbo_P))

    # The update, unless the loss or the gradient norm is not finite or too large.
    learning_rate = float(state.optimizer.param_groups[0]["lr"])
    deviations = measure_deviations(state, loss, grad_norm)
    is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
    applied = is_finite and deviations <= (config.skip_deviations or math.inf)
    if applied:
        apply_gradients(state.optimizer, grad_norm)
    losses_of = zip(objective.phases, losses_P.tolist(), plan.tokens, strict=True)
    result = StepResult(
        loss=loss,
        nelbo=nelbo,
        losses={phase.name: x for phase, x, n in losses_of if n or not phase.is_temporary},
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        skipped=not applied,
        deviations=deviations,
        num_tokens=sum(plan.tokens),
        bad_ranks=() if math.isfinite(loss) else find_bad_ranks(own_losses),
        requests=requests,
    )
    advance(state, result, config, flops_per_token)
    return result


def reduce_step(
    own_losses: Tensor,
    own_gradients: Tensor,
    own_requests: tuple[int, ...],
    groups: ProcessGroupCollection,
) -> tuple[Tensor, float, tuple[int, ...]]:
    """Reduce over the ranks what a step reports, and wait for it once; collective over the world.

    Args:
        own_losses: This rank's part of the losses, as of `run_micro_batches`.
        own_gradients: This rank's part of the gradient norm, as of `measure_gradients`.
        own_requests: This rank's requests; as many on every rank.
        groups: The groups of this rank.

    Returns:
        The losses of the global batch on the host, the norm of the whole gradient (NaN if any rank
        has gradients that are not finite), and the largest value of each request.
    """
    # Tensor-parallel ranks hold the same losses.
    counted = own_losses if groups.tp.rank() == 0 else torch.zeros_like(own_losses)
    totals = torch.cat([counted, own_gradients])
    dist.all_reduce(totals)
    # Requests are written by kernels: a tensor of numbers would make the host wait.
    requests_Q = totals.new_zeros(len(own_requests))
    for number, request in enumerate(own_requests):
        if request:
            requests_Q[number].fill_(request)
    if own_requests:
        dist.all_reduce(requests_Q, op=dist.ReduceOp.MAX)
    fetched = torch.cat([totals, requests_Q]).cpu()
    losses, (squared, num_bad, *requests) = (
        fetched[: len(own_losses)],
        fetched[len(own_losses) :].tolist(),
    )
    return losses, math.nan if num_bad else math.sqrt(squared), tuple(map(int, requests))


def run_micro_batches(
    state: TrainState,
    plan: StepPlan,
    objective: Objective,
    groups: ProcessGroupCollection,
    dropout_seed: int | None,
) -> Tensor:
    """Run forward and backward of a step; collective over the world.

    Returns:
        Float64 `[2 P]`: this rank's part of the losses of the P phases, first with the weights of
        the objective, then with those of the NELBO; zeros on pipeline stages without losses.
    """
    step = partial(
        forward_step,
        objective=objective,
        tokens=plan.tokens,
        # Megatron-Core averages over micro-batches, but the loss is a sum.
        scale=len(plan.micro_batches),
        dropout_seed=dropout_seed,
        pp_rank=groups.pp.rank(),
    )
    number = len(plan.micro_batches)
    reports = run_schedule(step, state, plan.micro_batches, number, groups, forward_only=False)
    if not reports:
        device = torch.cuda.current_device()
        return torch.zeros(2 * len(objective.phases), dtype=torch.float64, device=device)
    return torch.stack(reports).sum(0)


def advance(
    state: TrainState, result: StepResult, config: TrainConfig, flops_per_token: float
) -> None:
    """Update schedule, average, statistics and counters after a step; no communication."""
    state.scheduler.step(1)
    if not result.skipped:
        if state.ema is not None:
            state.ema.update()
        state.losses = state.losses.add(result.loss)
        state.grad_norms = state.grad_norms.add(log_norm(result.grad_norm))
    done = state.counters
    state.counters = dataclasses.replace(
        done,
        step=done.step + 1,
        consumed_samples=done.consumed_samples + config.global_batch_size,
        tokens=done.tokens + result.num_tokens,
        flops=done.flops + result.num_tokens * flops_per_token,
        skipped_steps=done.skipped_steps + result.skipped,
        skipped_in_row=done.skipped_in_row + 1 if result.skipped else 0,
        spikes=done.spikes + (0 < config.spike_deviations <= result.deviations),
    )


def clear_gradients(state: TrainState) -> None:
    """Set the gradient buffers to zero, and the parameters' gradients to None."""
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()


def find_bad_ranks(own_losses: Tensor) -> tuple[int, ...]:
    """Return the ranks whose own losses are not finite; collective over the world."""
    is_bad = torch.zeros(dist.get_world_size(), device=torch.cuda.current_device())
    is_bad[dist.get_rank()] = float(not own_losses.isfinite().all())
    dist.all_reduce(is_bad)
    return tuple(is_bad.nonzero().flatten().tolist())


def measure_deviations(state: TrainState, loss: float, grad_norm: float) -> float:
    """Return by how many standard deviations loss or gradient norm exceed those of earlier steps.

    It is the larger of the two.
    """
    return max(state.losses.deviations(loss), state.grad_norms.deviations(log_norm(grad_norm)))


def log_norm(grad_norm: float) -> float:
    """Return the logarithm of a gradient norm, since its deviations are relative to its size."""
    return math.log(max(grad_norm, sys.float_info.min)) if math.isfinite(grad_norm) else math.inf


def forward_step(
    micro_batches: Iterator[MicroBatch],
    model: torch.nn.Module,
    *,
    objective: Objective,
    tokens: Sequence[int],
    scale: int,
    dropout_seed: int | None,
    pp_rank: int,
) -> tuple[Tensor, LossFunction]:
    """Run one micro-batch through this stage's part of the model.

    Megatron-Core's schedules call it.

    Args:
        micro_batches: The remaining micro-batches.
        model: This stage's part of the model.
        objective: The objective, which combines the losses of the phases.
        tokens: The number of real tokens of each phase in the global batch.
        scale: What the loss for backward is multiplied by.
        dropout_seed: The run's seed; None without dropout.
        pp_rank: The number of this pipeline stage.

    Returns:
        The stage's output, and the function that turns the last stage's output into the loss for
        backward and this rank's report: float64 `[2 P]` as of `run_micro_batches`.
    """
    # The dropout of a micro-batch depends on its samples and the part of the model.
    micro_batch = next(micro_batches)
    if dropout_seed is not None:
        chunk = 8192 * (pp_rank + 1024 * (unwrap_model(model).vp_stage or 0))
        words = random_bits(dropout_seed, Purpose.DROPOUT, int(micro_batch.indices_B.min()), 1)
        seed_dropout(int(words[0] >> np.uint64(33)) + chunk)
    # The loss for backward is float32, the reported ones are float64.
    micro_batch = micro_batch.to(torch.device(torch.cuda.current_device()))
    loss = micro_batch.loss

    def sum_losses(nll_E: Tensor, weights_E: Tensor) -> Tensor:
        return normalize_phases(sum_phases(nll_E, weights_E, loss, len(tokens)), tokens)

    def compute_loss(nll_E: Tensor) -> tuple[Tensor, Tensor]:
        losses_P = sum_losses(nll_E, loss.weights_E)
        with torch.no_grad():
            report_P = sum_losses(nll_E.double(), loss.weights_E.double())
            elbo_P = sum_losses(nll_E.double(), loss.elbo_weights_E.double())
        return objective.combine(losses_P) * scale, torch.cat([report_P, elbo_P])

    return model(micro_batch.rows, loss.targets_E), compute_loss


def run_schedule(
    step: Callable[..., tuple[Tensor, Callable[..., Any]]],
    state: TrainState,
    micro_batches: Iterable[MicroBatch],
    number: int,
    groups: ProcessGroupCollection,
    *,
    forward_only: bool,
) -> list[Tensor]:
    """Run Megatron-Core's schedule of this layout; collective over the model-parallel ranks.

    Args:
        step: The forward pass of a micro-batch, as `forward_step`.
        state: The state with this rank's chunks.
        micro_batches: The micro-batches; each is made when the first chunk needs it.
        number: The number of micro-batches.
        groups: The groups of this rank.
        forward_only: Whether there is no backward pass.

    Returns:
        On the last stage the loss function's report of each micro-batch, on others an empty list.
    """
    chunks = state.chunks
    schedule = get_forward_backward_func(
        pp_size=groups.pp.size(), vp_size=len(chunks) if len(chunks) > 1 else None
    )
    reports: list[Tensor] = schedule(
        forward_step_func=step,
        data_iterator=list(tee(micro_batches, len(chunks))),
        model=chunks,
        num_microbatches=number,
        # Neither is used: the stages exchange the number of rows.
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return reports if is_pp_last_stage(groups.pp) else []


def reduce_over_world(report: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """Sum the reports of the last stages over the data-parallel ranks; collective over the world.

    Tensor-parallel ranks hold the same report, so only the first one's is added.
    """
    total = report.to(torch.cuda.current_device())
    if groups.tp.rank() > 0:
        total = torch.zeros_like(total)
    dist.all_reduce(total)
    return total.cpu()
