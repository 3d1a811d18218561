"""The validation NELBO: on fixed noise, the same on every layout."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_eso.config.sections import Config
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.objectives.loss import (
    NelboEstimate,
    estimate_nelbo,
    mean_by_time,
    sum_samples,
)
from megatron_eso.objectives.noise import validation_times
from megatron_eso.training.batches import (
    VALIDATION_SEED,
    MicroBatch,
    count_validation_samples,
    plan_any_order,
    plan_validation,
)
from megatron_eso.training.optimization.main_parameters import synchronize_parameters
from megatron_eso.training.step import reduce_over_world, run_schedule
from megatron_eso.training.train_state import TrainState


def evaluate(
    config: Config,
    state: TrainState,
    dataset: TokenDataset,
    groups: ProcessGroupCollection,
    *,
    use_ema: bool,
) -> NelboEstimate:
    """Estimate the NELBO of the validation set; collective over the world.

    Args:
        config: The resolved configuration.
        state: Left as it was.
        dataset: The validation shards.
        groups: Groups of this rank.
        use_ema: Evaluate the average instead of the weights.
    """
    assert not use_ema or state.ema is not None
    average = state.ema.applied(state.chunks, state.optimizer) if use_ema and state.ema else None
    micro_batches = plan_validation(
        config,
        dataset,
        data_parallel_rank=groups.dp.rank(),
        data_parallel_size=groups.dp.size(),
    )
    num_samples = count_validation_samples(config, dataset)
    with average or nullcontext():
        diffusion_N, sequential_N = sum_over_samples(
            state, list(micro_batches), num_samples, groups
        ).numpy()
    length = config.data.sequence_length
    estimate = estimate_nelbo(diffusion_N, sequential_N, length)
    if config.objective.alpha_0 == 0:  # no diffusion phase
        return estimate
    t_N = validation_times(
        VALIDATION_SEED,
        np.arange(num_samples),
        num_samples,
        sampling_eps=config.objective.sampling_eps,
    )
    return replace(estimate, diffusion_by_t=mean_by_time(diffusion_N / length, t_N))


def evaluate_any_order(
    config: Config,
    state: TrainState,
    dataset: TokenDataset,
    groups: ProcessGroupCollection,
    num_orders: int,
) -> float:
    """Bound the likelihood by the mean over orders; collective over the world.

    Each order gives a sample's exact likelihood in it; -log of their mean over `num_orders` orders
    is a bound that tightens with their number (the reference's algo.py, `num_iw_orders`).

    Returns:
        Nats per token, the mean over the validation set.
    """
    num_samples = count_validation_samples(config, dataset)
    nll = []
    for number in range(num_orders):
        micro_batches = plan_any_order(
            config,
            dataset,
            number,
            data_parallel_rank=groups.dp.rank(),
            data_parallel_size=groups.dp.size(),
        )
        nll.append(sum_over_samples(state, list(micro_batches), num_samples, groups)[1])
    bound_N = math.log(num_orders) - torch.stack(nll).neg().logsumexp(0)
    return float(bound_N.mean()) / config.data.sequence_length


def sum_over_samples(
    state: TrainState,
    micro_batches: list[MicroBatch],
    num_samples: int,
    groups: ProcessGroupCollection,
) -> Tensor:
    """Sums [2, N] of every sample of the set in either phase; collective over the world.

    Args:
        state: Left as it was; its weights as they are.
        micro_batches: This rank's part of the set.
        num_samples: N.
        groups: Groups of this rank.
    """
    reports: list[Tensor] = []
    with torch.no_grad(), for_evaluation(state.chunks):
        if micro_batches:
            # An interleaved pipeline wants as many as it has stages: the last one again.
            missing = groups.pp.size() - len(micro_batches) if len(state.chunks) > 1 else 0
            padded = micro_batches + micro_batches[-1:] * missing
            reports = run_schedule(evaluation_step, state, padded, groups, forward_only=True)
    sums = torch.zeros(2, num_samples, dtype=torch.float64)
    for micro_batch, report in zip(micro_batches, reports, strict=False):
        sums[micro_batch.is_sequential.astype(int), micro_batch.indices] = report.cpu()
    return reduce_over_world(sums, groups)


def evaluation_step(
    micro_batches: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """One micro-batch through this stage's part of the model; reports each sample's sum."""
    micro_batch = next(micro_batches)
    plan = micro_batch.plan.to(torch.device(torch.cuda.current_device()))

    def sum_losses(nll_E: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros((), device=nll_E.device), sum_samples(
            nll_E, plan, len(micro_batch.indices)
        )

    return model(plan), sum_losses


@contextmanager
def for_evaluation(chunks: list[DistributedDataParallel]) -> Iterator[None]:
    """Switch dropout off, and hold the gathering of parameters that overlaps with a forward.

    A data-parallel rank may have no validation samples: it must not be waited for in a forward.
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


def validation_metrics(estimate: NelboEstimate, prefix: str) -> dict[str, float]:
    """The estimate under its TensorBoard tags."""
    return {
        f"{prefix}/nelbo": estimate.nelbo,
        f"{prefix}/perplexity": estimate.perplexity,
        f"{prefix}/nelbo_diffusion": estimate.diffusion,
        f"{prefix}/nelbo_sequential": estimate.sequential,
        f"{prefix}/nelbo_stderr": estimate.standard_error,
    } | {
        f"{prefix}/nelbo_diffusion_by_t/{t:.2f}": value
        for t, value in estimate.diffusion_by_t.items()
    }
