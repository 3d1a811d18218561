"""A training step timed on the device at hand, with the micro-batches that the simulator takes."""

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatron_eso.config.sections import Config
from megatron_eso.estimates.flops import training_flops_per_token
from megatron_eso.simulation.micro_batches import build_run_objective, plan_kinds
from megatron_eso.training.distributed.cpu_backend import install_cpu_backend
from megatron_eso.training.distributed.device import prepare_device
from megatron_eso.training.distributed.parallel import (
    find_timeout,
    model_parallel_groups,
    process_group,
)
from megatron_eso.training.steps.batches import StepPlan
from megatron_eso.training.steps.step import train_step
from megatron_eso.training.steps.train_state import build_train_state

WARMUP_STEPS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Measured steps of a run.

    Attributes:
        device: Name of this rank's device.
        world_size: Number of ranks.
        seconds: Time of each step.
        tokens: Tokens of a step, over all ranks.
        model_flops: FLOPs that the objective needs for a step, on each rank.
        memory: Most bytes of tensors on this rank's GPU; None without one.
    """

    device: str
    world_size: int
    seconds: tuple[float, ...]
    tokens: int
    model_flops: float
    memory: int | None

    @property
    def median(self) -> float:
        """Seconds of the middle step."""
        return sorted(self.seconds)[len(self.seconds) // 2]


def measure_steps(config: Config, num_steps: int, trace: Path | None) -> Measurement:
    """Time steps of the ranks that were launched; collective over them.

    Args:
        config: A configuration that `check_layout` accepts, with its vocabulary.
        num_steps: Steps to time, after two that are not timed.
        trace: Where rank 0 writes a trace of one more step; None: nowhere.
    """
    prepare_device(config)
    install_cpu_backend()
    train, objective = config.train, build_run_objective(config)
    with ExitStack() as stack:
        stack.enter_context(process_group(find_timeout(config.watchdog)))
        groups = stack.enter_context(model_parallel_groups(config.parallel))
        state = build_train_state(config, groups)
        # Micro-batches of the usual size, of each kind in turn.
        kinds = plan_kinds(config, groups.dp.size())
        number = train.global_batch_size // train.micro_batch_size // groups.dp.size()
        plan = StepPlan(
            micro_batches=[kinds[index % len(kinds)].usual for index in range(number)],
            tokens=(train.global_batch_size * config.data.sequence_length,) * len(objective.phases),
        )

        def take_step() -> float:
            start = time.perf_counter()
            train_step(
                state,
                plan,
                objective,
                train,
                groups,
                flops_per_token=1.0,
                dropout_seed=config.run.seed if config.model.hidden_dropout > 0 else None,
            )
            torch.cuda.synchronize()
            return time.perf_counter() - start

        # Time the steps after the first ones, which allocate and compile.
        for _ in range(WARMUP_STEPS):
            take_step()
        seconds = tuple(take_step() for _ in range(num_steps))
        if trace is not None:
            _trace_step(take_step, trace)
        return _summarize(config, seconds)


def _trace_step(take_step: Callable[[], float], path: Path) -> None:
    """Write a step's trace, which Perfetto and TensorBoard read; on rank 0."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    is_first = dist.get_rank() == 0
    with profile(activities=activities) if is_first else nullcontext() as profiler:
        take_step()
    if profiler is not None:
        profiler.export_chrome_trace(str(path))


def _summarize(config: Config, seconds: tuple[float, ...]) -> Measurement:
    num_tokens, world_size = config.data.sequence_length, dist.get_world_size()
    tokens = config.train.global_batch_size * num_tokens
    per_token = training_flops_per_token(
        config.model, config.data.vocabulary.size, build_run_objective(config), num_tokens
    )
    has_gpu = torch.cuda.is_available()
    return Measurement(
        device=torch.cuda.get_device_name() if has_gpu else "CPU",
        world_size=world_size,
        seconds=seconds,
        tokens=tokens,
        model_flops=per_token * tokens / world_size,
        memory=torch.cuda.max_memory_allocated() if has_gpu else None,
    )


def format_measurement(found: Measurement) -> str:
    """Return the measured figures as text."""
    speed = found.tokens / found.median / found.world_size
    lines = [
        f"measured: {found.world_size} x {found.device}, {len(found.seconds)} steps",
        f"a step: {found.median:.3f} s (median; {min(found.seconds):.3f} to "
        f"{max(found.seconds):.3f}), {speed:,.0f} tokens/s per rank",
        f"model FLOP/s of a rank: {found.model_flops / found.median / 1e12:.3g}e12",
    ]
    if found.memory is not None:
        lines.append(f"memory of tensors at the peak: {found.memory / 2**30:.2f} GiB")
    return "\n".join(lines) + "\n"
