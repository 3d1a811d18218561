"""Real training steps on the ranks that were launched: how long they take and what they hold."""

import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_eso.benchmark.batches import draw_plans, read_plans
from megatron_eso.benchmark.device import StepMemory, count_memory, measure_peak
from megatron_eso.benchmark.inspection import Inspection, inspect_step
from megatron_eso.config.sections import Config
from megatron_eso.data.samples.training_data import TrainingData
from megatron_eso.errors import ConfigError
from megatron_eso.estimates.flops import training_flops_per_token
from megatron_eso.quantities import GIB
from megatron_eso.ranks import own_rank
from megatron_eso.simulation.memory import Memory
from megatron_eso.simulation.micro_batches import build_run_objective, find_largest, plan_kinds
from megatron_eso.simulation.stage import label_state
from megatron_eso.training.distributed.cpu_backend import install_cpu_backend
from megatron_eso.training.distributed.device import prepare_device
from megatron_eso.training.distributed.parallel import (
    find_timeout,
    model_parallel_groups,
    process_group,
)
from megatron_eso.training.records.device import published_peak
from megatron_eso.training.steps.batches import StepPlan
from megatron_eso.training.steps.step import StepResult, train_step
from megatron_eso.training.steps.train_state import TrainState, build_train_state


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to measure.

    Attributes:
        num_warmup_steps: Steps before the clock starts.
        num_steps: Steps that are timed.
        trace_folder: Where every rank writes the trace of a step; None: nowhere.
        data: The open training data of the run; None: tokens are drawn.
    """

    num_warmup_steps: int
    num_steps: int
    trace_folder: Path | None
    data: TrainingData | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMeasurement:
    """What was measured on a rank.

    Attributes:
        rank: The rank.
        num_parameters: Parameters on the rank.
        step_seconds: Each timed step.
        data_seconds: Of these, the wait for data.
        num_tokens: Tokens of the last step, on all ranks together.
        num_skipped: Timed steps whose update was skipped.
        held: Bytes by part that the training state takes.
        memory: Peaks of the timed steps.
        largest_memory: Peaks of a step of the largest micro-batches; none without a GPU.
        inspection: One more step, part by part.
    """

    rank: int
    num_parameters: int
    step_seconds: list[float]
    data_seconds: list[float]
    num_tokens: int
    num_skipped: int
    held: dict[str, int]
    memory: StepMemory
    largest_memory: StepMemory | None
    inspection: Inspection


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What was measured on all ranks.

    Attributes:
        device: Name of rank 0's GPU, or `CPU`.
        ranks: Each rank.
        num_micro_batches: Micro-batches of a step on each rank.
        num_steps: Steps of the run.
        model_flops: FLOPs that the objective needs for a step, on each rank.
        published_peak: Of the GPU, bf16 FLOP/s; None where it is not known.
        measured_peak: What a large matrix product reaches, bf16 FLOP/s; None without a GPU.
    """

    device: str
    ranks: list[RankMeasurement]
    num_micro_batches: int
    num_steps: int
    model_flops: float
    published_peak: float | None
    measured_peak: float | None

    @property
    def slowest(self) -> RankMeasurement:
        """The rank whose kernels take longest."""
        return max(
            self.ranks,
            key=lambda rank: sum(use.seconds for use in rank.inspection.parts.values()),
        )

    @property
    def fullest(self) -> RankMeasurement:
        """The rank with the highest peak of memory."""
        return max(self.ranks, key=lambda rank: rank.memory.peak)

    @property
    def step_seconds(self) -> list[float]:
        """Each timed step, on the rank where it took longest."""
        return [
            max(times) for times in zip(*(rank.step_seconds for rank in self.ranks), strict=True)
        ]

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all ranks together."""
        return self.ranks[0].num_tokens / self.median

    @property
    def utilizations(self) -> dict[str, float]:
        """Model FLOPs utilization of whole steps, against each peak that is known."""
        peaks = {"of_published_peak": self.published_peak, "of_measured_peak": self.measured_peak}
        reached = self.model_flops / self.median
        return {name: reached / peak for name, peak in peaks.items() if peak}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rank:
    """This rank of the run, with its model, its optimizer and its process groups."""

    config: Config
    state: TrainState
    groups: ProcessGroupCollection

    def take_step(self, plan: StepPlan) -> StepResult:
        """Take a step, and wait until the device is done; collective over the world."""
        config = self.config
        result = train_step(
            self.state,
            plan,
            build_run_objective(config),
            config.train,
            self.groups,
            flops_per_token=1.0,
            dropout_seed=config.run.seed if config.model.hidden_dropout > 0 else None,
        )
        torch.cuda.synchronize()
        return result


def measure(config: Config, request: Request) -> Measurement:
    """Build the training state and take steps; collective over the ranks that were launched.

    Args:
        config: A configuration that `check_layout` accepts, with its vocabulary.
        request: What to measure.

    Raises:
        ConfigError: The GPU lacks memory.
        DataError: A shard is damaged.
    """
    prepare_device(config)
    install_cpu_backend()
    with ExitStack() as stack:
        stack.enter_context(process_group(find_timeout(config.watchdog)))
        groups = stack.enter_context(model_parallel_groups(config.parallel))
        # Each rank measures itself, then all figures are gathered.
        peak = measure_peak()
        try:
            own = _measure_rank(config, request, groups, stack)
        except torch.OutOfMemoryError as error:
            raise _explain_shortage(config) from error
        ranks = [own] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        # FLOPs that the objective needs, from which the utilization follows.
        train = config.train
        objective, length = build_run_objective(config), config.data.sequence_length
        per_token = training_flops_per_token(
            config.model, config.data.vocabulary.size, objective, length
        )
        return Measurement(
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            ranks=ranks,
            num_micro_batches=_count_micro_batches(config, groups),
            num_steps=train.num_steps,
            model_flops=per_token * train.global_batch_size * length / len(ranks),
            published_peak=published_peak(),
            measured_peak=peak,
        )


def _measure_rank(
    config: Config, request: Request, groups: ProcessGroupCollection, stack: ExitStack
) -> RankMeasurement:
    """Measure this rank; collective over the world."""
    # The rank, and where its plans come from.
    rank = Rank(config=config, state=build_train_state(config, groups), groups=groups)
    first, num_steps = request.num_warmup_steps, request.num_steps
    if request.data is None:
        take_plan = draw_plans(config, groups, first + num_steps + 1)
    else:
        take_plan = stack.enter_context(read_plans(config, groups, request.data))

    # As in training, the largest micro-batch comes first: what lacks memory fails at once.
    largest_memory = _try_largest(rank) if torch.cuda.is_available() else None
    for number in range(first):
        rank.take_step(take_plan(number))
    memory = Memory(torch.device(torch.cuda.current_device()).type)
    label_state(memory, rank.state)

    # The timed steps.
    step_seconds, data_seconds, results = [], [], []
    dist.barrier()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for number in range(first, first + num_steps):
        began = time.perf_counter()
        plan = take_plan(number)
        data_seconds.append(time.perf_counter() - began)
        results.append(rank.take_step(plan))
        step_seconds.append(time.perf_counter() - began)
    step_memory = count_memory()

    # One more, under the profiler, which slows it down.
    plan = take_plan(first + num_steps)
    trace = request.trace_folder
    inspection = inspect_step(
        lambda: rank.take_step(plan),
        None if trace is None else trace / f"rank_{own_rank()}.pt.trace.json",
    )
    return RankMeasurement(
        rank=own_rank(),
        num_parameters=sum(each.model.numel() for each in rank.state.parameters),
        step_seconds=step_seconds,
        data_seconds=data_seconds,
        num_tokens=results[-1].num_tokens,
        num_skipped=sum(result.skipped for result in results),
        held=memory.held,
        memory=step_memory,
        largest_memory=largest_memory,
        inspection=inspection,
    )


def _try_largest(rank: Rank) -> StepMemory:
    """Take a step of as many of the largest micro-batches as are in flight at once."""
    config, groups = rank.config, rank.groups
    num_stages, number = groups.pp.size(), _count_micro_batches(config, groups)
    in_flight = 1 if num_stages == 1 else min(2 * num_stages, number)
    kinds = plan_kinds(config, groups.dp.size())
    num_phases = len(build_run_objective(config).phases)
    plan = StepPlan(micro_batches=[find_largest(kinds)] * in_flight, tokens=(1,) * num_phases)
    rank.take_step(plan)
    memory = count_memory()
    torch.cuda.empty_cache()
    return memory


def _count_micro_batches(config: Config, groups: ProcessGroupCollection) -> int:
    per_round: int = config.train.micro_batch_size * groups.dp.size()
    return config.train.global_batch_size // per_round


def _explain_shortage(config: Config) -> ConfigError:
    """Return the error of a rank whose GPU lacks memory."""
    used = torch.cuda.max_memory_allocated() / GIB
    return ConfigError(
        f"rank {own_rank()}: out of memory beyond {used:.1f} GiB: lower train.micro_batch_size = "
        f"{config.train.micro_batch_size}, or see which layout fits with --simulate"
    )
