"""The validation NELBO: on fixed noise, the same on every layout."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_eso.config import Config
from megatron_eso.data.batches import MicroBatch, count_validation_samples, plan_validation
from megatron_eso.data.reader import TokenDataset
from megatron_eso.diffusion.loss import NelboEstimate, estimate_nelbo, sum_samples
from megatron_eso.training.main_parameters import synchronize_parameters
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
    with torch.no_grad(), for_evaluation(state.chunks), average or nullcontext():
        micro_batches = list(
            plan_validation(
                config,
                dataset,
                data_parallel_rank=groups.dp.rank(),
                data_parallel_size=groups.dp.size(),
            )
        )
        reports: list[Tensor] = []
        if micro_batches:
            reports = run_schedule(evaluation_step, state, micro_batches, groups, forward_only=True)
    sums = torch.zeros(2, count_validation_samples(config, dataset), dtype=torch.float64)
    for micro_batch, report in zip(micro_batches, reports, strict=bool(reports)):
        sums[micro_batch.is_sequential.astype(int), micro_batch.indices] = report.cpu()
    diffusion_N, sequential_N = reduce_over_world(sums, groups).numpy()
    return estimate_nelbo(diffusion_N, sequential_N, config.data.sequence_length)


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
    }
