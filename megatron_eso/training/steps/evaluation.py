"""Estimates the NELBO and exact likelihoods of a validation set with fixed noise, on any layout."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from numpy.typing import NDArray
from torch import Tensor

from megatron_eso.batches.loss import NelboEstimate, estimate_nelbo, mean_by_time, sum_samples
from megatron_eso.batches.rows import MicroBatch
from megatron_eso.training.optimization.main_parameters import synchronize_parameters
from megatron_eso.training.steps.batches import ValidationBatches
from megatron_eso.training.steps.prefetch import plan_ahead
from megatron_eso.training.steps.step import reduce_over_world, run_schedule
from megatron_eso.training.steps.train_state import TrainState


def evaluate(
    state: TrainState,
    batches: ValidationBatches,
    groups: ProcessGroupCollection,
    *,
    use_ema: bool,
) -> NelboEstimate:
    """Estimate the NELBO of the validation set; collective over the world.

    Args:
        state: The state, which is not changed.
        batches: The validation set.
        groups: The groups of this rank.
        use_ema: Whether the average is evaluated instead of the weights.
    """
    assert not use_ema or state.ema is not None
    average = state.ema.applied(state.chunks, state.optimizer) if use_ema and state.ema else None
    micro_batches = batches.plan(groups.dp.rank(), groups.dp.size())
    with average or nullcontext():
        sums_PN = sum_over_samples(state, micro_batches, batches, groups).numpy()
    length, phases = batches.num_targets, batches.objective.phases
    names = [phase.name for phase in phases if not phase.is_temporary]
    times = batches.objective.validation_times(batches.num_samples)
    by_time = {
        name: mean_by_time(sums_PN[names.index(name)] / length, times[name]) for name in times
    }
    return replace(estimate_nelbo(sums_PN[: len(names)], names, length), by_time=by_time)


def evaluate_orders(
    state: TrainState,
    batches: ValidationBatches,
    groups: ProcessGroupCollection,
    num_orders: int,
) -> float:
    """Estimate the bound by the mean likelihood over orders; collective over the world.

    A sample has an exact likelihood in each order. The negative logarithm of its mean over
    `num_orders` orders is a bound, tighter with more orders (the reference's algo.py,
    `num_iw_orders`).

    Returns:
        The bound in nats per token, the mean over the validation set.
    """
    nll = []
    for number in range(num_orders):
        micro_batches = batches.plan_order(number, groups.dp.rank(), groups.dp.size())
        nll.append(sum_over_samples(state, micro_batches, batches, groups).sum(0))
    bound_N = math.log(num_orders) - torch.stack(nll).neg().logsumexp(0)
    return float(bound_N.mean()) / batches.num_targets


def sum_over_samples(
    state: TrainState,
    micro_batches: Iterator[MicroBatch],
    batches: ValidationBatches,
    groups: ProcessGroupCollection,
) -> Tensor:
    """Return `[P, N]`: the sum of each sample's losses in each phase; collective over the world.

    Args:
        state: The state, whose present weights are used.
        micro_batches: This rank's part of the set, which a thread plans ahead.
        batches: The set.
        groups: The groups of this rank.
    """
    number, stages = batches.count(groups.dp.rank(), groups.dp.size()), groups.pp.size()
    # An interleaved pipeline needs at least one for each stage: the last one is repeated.
    missing = max(stages - number, 0) if number and len(state.chunks) > 1 else 0
    samples: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []

    def take(planned: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        for micro_batch in planned:
            samples.append((micro_batch.phase_B, micro_batch.indices_B))
            yield micro_batch
        yield from [micro_batch] * missing

    reports: list[Tensor] = []
    with torch.no_grad(), for_evaluation(state.chunks), plan_ahead(micro_batches) as planned:
        if number:
            reports = run_schedule(
                evaluation_step,
                state,
                take(planned),
                number + missing,
                groups,
                forward_only=True,
            )
    # The reports come in the order of the micro-batches.
    num_phases = len(batches.objective.phases)
    sums_PN = torch.zeros(num_phases, batches.num_samples, dtype=torch.float64)
    for (phase_B, indices_B), report in zip(samples, reports, strict=False):
        sums_PN[phase_B, indices_B] = report.cpu()
    return reduce_over_world(sums_PN, groups)


def evaluation_step(
    micro_batches: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """Run one micro-batch through this stage's part of the model, and sum the losses by sample."""
    micro_batch = next(micro_batches).to(torch.device(torch.cuda.current_device()))
    loss, num_samples = micro_batch.loss, len(micro_batch.indices_B)

    def sum_losses(nll_E: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros((), device=nll_E.device), sum_samples(nll_E, loss, num_samples)

    return model(micro_batch.rows, loss.targets_E), sum_losses


@contextmanager
def for_evaluation(chunks: list[DistributedDataParallel]) -> Iterator[None]:
    """Switch off dropout and the gathering of parameters during a forward.

    A data-parallel rank without validation samples runs no forward, so no forward may wait for it.
    """
    overlapped = [chunk for chunk in chunks if chunk.use_forward_hook]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook(param_sync=False)
    synchronize_parameters(chunks)
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in chunks:
            chunk.train()
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()
