"""Proposes a layout and a micro-batch for a model, a GPU and a number of GPUs.

Every layout that the checks accept and whose memory fits is a candidate; the fastest ones win.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megatron_eso.config.combinations import check_config, check_layout
from megatron_eso.config.sections import Config
from megatron_eso.errors import ConfigError
from megatron_eso.estimates.fit import (
    Fit,
    change_parallel,
    change_train,
    describe_changes,
    measure_fit,
)
from megatron_eso.estimates.flops import training_flops_per_token
from megatron_eso.estimates.gpus import GPUS_PER_NODE, Gpu
from megatron_eso.estimates.step_time import StepTime, estimate_step
from megatron_eso.objectives.objective import Objective
from megatron_eso.quantities import GIB

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
PIPELINES = (1, 2, 4, 8, 16)
CHUNKS = (None, 2, 4)
NUM_SHOWN = 5
NEAR = 1.02
"""Steps that take at most this much longer than the fastest ones count as equally fast."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A layout that fits, with its estimated time and memory."""

    config: Config
    changes: str
    time: StepTime
    fit: Fit
    tokens_per_second: float
    mfu: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The candidates, the proposed one first and then by speed, and why others were left out."""

    candidates: tuple[Candidate, ...]
    num_refused: int
    num_too_large: int


def plan_layout(config: Config, objective: Objective, world_size: int, gpu: Gpu) -> Plan:
    """Try the layouts of `world_size` GPUs for a model.

    Args:
        config: The model, its data and its global batch; with its vocabulary.
        objective: Its objective.
        world_size: Number of ranks.
        gpu: The GPU of every rank.
    """
    candidates, num_refused, num_too_large = [], 0, 0
    for proposed in _list_layouts(config, world_size):
        try:
            check_config(proposed)
            check_layout(proposed, world_size)
        except ConfigError:
            num_refused += 1
            continue
        fit = measure_fit(proposed, objective, world_size, gpu)
        if not fit.is_enough:
            num_too_large += 1
            continue
        candidates.append(_judge(config, proposed, objective, fit, world_size))
    candidates.sort(key=lambda each: each.time.total)
    # Of those that are nearly as fast as the fastest one, the one that is least tight.
    near = [each for each in candidates if each.time.total <= NEAR * candidates[0].time.total]
    if near:
        best = min(near, key=lambda each: each.fit.needed)
        candidates.remove(best)
        candidates.insert(0, best)
    return Plan(candidates=tuple(candidates), num_refused=num_refused, num_too_large=num_too_large)


def format_plan(plan: Plan, world_size: int, gpu: Gpu) -> str:
    """Return the plan as text: the winner with its reasons, and those that come next."""
    tried = len(plan.candidates) + plan.num_refused + plan.num_too_large
    lines = [
        f"plan for {world_size} x {gpu.name}, estimated from sizes: {tried} layouts, "
        f"{plan.num_refused} do not divide, {plan.num_too_large} do not fit"
    ]
    if not plan.candidates:
        return "\n".join([*lines, "no layout fits: use more GPUs", ""])
    best, *others = plan.candidates[:NUM_SHOWN]
    lines.append(f"of those within {NEAR - 1:.0%} of the fastest, the one that needs least memory:")
    time = best.time
    lines += [
        f"use: {best.changes or 'the configuration as it is'}",
        f"  {best.tokens_per_second:,.0f} tokens/s per GPU, MFU {best.mfu:.1%}, "
        f"{best.fit.needed / GIB:.1f} of {gpu.memory / GIB:.1f} GiB",
        f"  a step: {time.total:.3f} s = kernels {time.kernels:.3f} + optimizer {time.update:.3f} "
        f"+ communication {time.communication:.3f} + pipeline bubble {time.bubble:.3f}",
        "next:",
    ]
    lines += [
        f"  {best.time.total / each.time.total:.0%} of its speed, {each.fit.needed / GIB:.1f} GiB: "
        f"{each.changes or 'the configuration as it is'}; {_explain(best, each)}"
        for each in others
    ]
    lines.append(f"check with: pretrain.bench ... --simulate {gpu.name} --world-size {world_size}")
    return "\n".join(lines) + "\n"


def _explain(best: Candidate, other: Candidate) -> str:
    """Return in which part of the step another candidate loses most."""
    losses = {
        "kernels": other.time.kernels - best.time.kernels,
        "optimizer": other.time.update - best.time.update,
        "communication": other.time.communication - best.time.communication,
        "pipeline bubble": other.time.bubble - best.time.bubble,
    }
    name = max(losses, key=lambda part: losses[part])
    return f"{name} {losses[name] * 1e3:+.0f} ms"


def _judge(
    config: Config, proposed: Config, objective: Objective, fit: Fit, world_size: int
) -> Candidate:
    """Estimate the time of a layout that fits."""
    time = estimate_step(proposed, objective, world_size, fit.gpu)
    num_tokens = config.data.sequence_length
    tokens = config.train.global_batch_size * num_tokens
    vocab_size = config.data.vocab_size or 0
    flops = training_flops_per_token(config.model, vocab_size, objective, num_tokens)
    speed = tokens / time.total / world_size
    return Candidate(
        config=proposed,
        changes=describe_changes(config, proposed),
        time=time,
        fit=fit,
        tokens_per_second=speed,
        mfu=speed * flops / fit.gpu.bf16_flops,
    )


def _list_layouts(config: Config, world_size: int) -> Iterator[Config]:
    """List the layouts to try; tensor parallelism stays within a node."""
    tensor_sizes = [size for size in (1, 2, 4, 8) if size <= min(GPUS_PER_NODE, world_size)]
    for tensor, stages, chunks, size, recompute in product(
        tensor_sizes, PIPELINES, CHUNKS, MICRO_BATCHES, ("none", "full")
    ):
        if tensor * stages > world_size or (chunks and stages == 1):
            continue
        is_shared = tensor * stages < world_size
        layout = change_parallel(
            config,
            tensor_model_parallel_size=tensor,
            sequence_parallel=tensor > 1,
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=chunks,
            pipeline_model_parallel_layout=None,
            overlap_p2p_comm=chunks is not None,
            batch_p2p_comm=chunks is None,
            use_distributed_optimizer=is_shared,
            overlap_grad_reduce=is_shared,
            overlap_param_gather=is_shared,
        )
        yield change_train(layout, micro_batch_size=size, recompute_granularity=recompute)
