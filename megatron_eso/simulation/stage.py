"""One rank of a pipeline stage on the fake GPU: its build, steps of the usual size, the largest."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from unittest import mock

import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_eso.config.sections import Config
from megatron_eso.estimates.gpus import Gpu
from megatron_eso.objectives.rows import MicroBatch
from megatron_eso.simulation.collectives import Collective
from megatron_eso.simulation.fake_gpu import DEVICE_TYPE, fake_device, fake_gpu
from megatron_eso.simulation.memory import Memory
from megatron_eso.simulation.micro_batches import Kind, build_run_objective, copy_to_fake
from megatron_eso.simulation.parts import ONCE
from megatron_eso.simulation.recorder import PartUse, Recorder
from megatron_eso.simulation.timeline import Timeline
from megatron_eso.training.distributed.parallel import model_parallel_groups
from megatron_eso.training.steps.batches import StepPlan
from megatron_eso.training.steps.step import train_step
from megatron_eso.training.steps.train_state import TrainState, build_train_state

OF_MICRO_BATCHES = ("tensor", "pipeline")
"""Purposes of the collectives that every micro-batch has; the others come once in a step."""


def _zeros() -> defaultdict[str, float]:
    return defaultdict(float)


class RecordedStep(Protocol):
    """A step that was simulated or measured."""

    @property
    def parts(self) -> Mapping[str, PartUse]:
        """What each part took."""

    @property
    def timeline(self) -> Timeline:
        """How long collectives took, and how long kernels waited for them."""


@dataclass(kw_only=True, slots=True)
class StepUse:
    """What a step takes: the mean over the kinds of micro-batches.

    Attributes:
        parts: Each part of one micro-batch, forward and backward.
        once: Each part that comes once in a step.
        exposed: Seconds that the kernels of a micro-batch wait for collectives, by purpose.
        exposed_once: Seconds that they wait once in a step.
        busy: Seconds of the collectives of a micro-batch.
        busy_once: Seconds of those that come once.
    """

    parts: dict[str, PartUse] = field(default_factory=dict)
    once: dict[str, PartUse] = field(default_factory=dict)
    exposed: defaultdict[str, float] = field(default_factory=_zeros)
    exposed_once: defaultdict[str, float] = field(default_factory=_zeros)
    busy: defaultdict[str, float] = field(default_factory=_zeros)
    busy_once: defaultdict[str, float] = field(default_factory=_zeros)

    def add(self, recorded: RecordedStep, num_micro_batches: int, share: float) -> None:
        """Add a recorded step, weighted by the share of its micro-batches."""
        for name, use in recorded.parts.items():
            parts, part_share = self.parts, share / num_micro_batches
            if name in ONCE:
                parts, part_share = self.once, share
            parts.setdefault(name, PartUse()).add(use, part_share)
        timeline = recorded.timeline
        for found, of_micro_batch, of_step in (
            (timeline.exposed, self.exposed, self.exposed_once),
            (timeline.busy, self.busy, self.busy_once),
        ):
            for purpose, seconds in found.items():
                if purpose in OF_MICRO_BATCHES:
                    of_micro_batch[purpose] += seconds * share / num_micro_batches
                else:
                    of_step[purpose] += seconds * share

    @property
    def seconds(self) -> float:
        """Of the kernels of a micro-batch."""
        return sum(use.seconds for use in self.parts.values())

    @property
    def seconds_once(self) -> float:
        """Of the kernels that come once in a step."""
        return sum(use.seconds for use in self.once.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class StageUse:
    """What training takes on a rank of a pipeline stage; all of it is simulated.

    Attributes:
        rank: The rank.
        num_parameters: Parameters on the rank.
        step: Time of a step.
        held: Bytes by part that are alive between steps.
        peak: Bytes by part at the moment when most are alive, with the largest micro-batches.
        waits: How often the host waits in a step of `num_micro_batches`, by reason and place.
        collectives: Collectives of a step of `num_micro_batches`.
        num_micro_batches: Micro-batches of the simulated step.
    """

    rank: int
    num_parameters: int
    step: StepUse
    held: dict[str, int]
    peak: dict[str, int]
    waits: dict[tuple[str, str], int]
    collectives: dict[Collective, int]
    num_micro_batches: int


def simulate_stage(
    config: Config, gpu: Gpu, world_size: int, stage: int, kinds: list[Kind]
) -> StageUse:
    """Build the first rank of a pipeline stage on the fake GPU and take steps.

    No other process takes part: the process groups are torch's `fake` ones.

    Args:
        config: Its vocabulary is known.
        gpu: The GPU that all ranks have.
        world_size: Number of ranks.
        stage: The pipeline stage.
        kinds: Micro-batches of the run.
    """
    stages = config.parallel.pipeline_model_parallel_size
    rank = stage * (world_size // stages)
    num_micro_batches = config.train.global_batch_size // config.train.micro_batch_size
    num_micro_batches //= world_size // config.parallel.model_parallel_size
    usual_number = min(stages, num_micro_batches)
    largest_number = 1 if stages == 1 else min(2 * stages, num_micro_batches)
    largest = max((kind.largest for kind in kinds), key=lambda batch: batch.rows.num_rows)
    recorder = Recorder(gpu)
    with ExitStack() as stack:
        stack.enter_context(_fake_world(rank, world_size))
        mode = stack.enter_context(fake_gpu(recorder.wait))
        groups = stack.enter_context(model_parallel_groups(config.parallel))
        stack.enter_context(recorder)
        state = build_train_state(config, groups)
        take_step = partial(_take_step, config, state, groups, recorder, mode)
        # The first step makes the optimizer's moments, which stay.
        take_step(kinds[0].tiny, usual_number)
        label_state(recorder.memory, state)
        held = dict(recorder.memory.held)
        use = StepUse()
        for kind in kinds:
            take_step(kind.usual, usual_number)
            use.add(recorder, usual_number, kind.share)
        waits, collectives = dict(recorder.waits), dict(recorder.collectives)
        take_step(largest, largest_number)
        return StageUse(
            rank=rank,
            num_parameters=sum(each.model.numel() for each in state.parameters),
            step=use,
            held=held,
            peak={label: size for label, size in recorder.memory.peak.items() if size},
            waits=waits,
            collectives=collectives,
            num_micro_batches=usual_number,
        )


def _take_step(
    config: Config,
    state: TrainState,
    groups: ProcessGroupCollection,
    recorder: Recorder,
    mode: FakeTensorMode,
    micro_batch: MicroBatch,
    number: int,
) -> None:
    """Take a step with `number` equal micro-batches, recorded from its start."""
    objective = build_run_objective(config)
    micro_batches = [copy_to_fake(micro_batch, mode)] * number
    recorder.restart()
    ranks = config.parallel.row_multiple
    shape = [len(micro_batch.rows.tokens_R) // ranks, 1, config.model.hidden_size]
    with _known_shapes(shape):
        result = train_step(
            state,
            StepPlan(micro_batches=micro_batches, tokens=(1,) * len(objective.phases)),
            objective,
            config.train,
            groups,
            flops_per_token=1.0,
            dropout_seed=config.run.seed if config.model.hidden_dropout > 0 else None,
        )
    assert not result.skipped, result


def label_state(memory: Memory, state: TrainState) -> None:
    """Count what stays between steps by what it is."""
    buffers = [buffer for chunk in state.chunks for buffer in chunk.buffers]
    weights = [buffer.param_data for buffer in buffers if buffer.param_data is not None]
    weights += [parameter.data for chunk in state.chunks for parameter in chunk.parameters()]
    weights += [buffer for chunk in state.chunks for buffer in chunk.module.buffers()]
    memory.relabel(weights, "weights")
    memory.relabel((buffer.grad_data for buffer in buffers), "gradients")
    mains = [each.main for each in state.parameters if each.main is not None]
    moments = [
        value
        for each in state.parameters
        if each.main is not None
        for value in each.inner.state[each.main].values()
    ]
    memory.relabel(mains, "optimizer")
    memory.relabel(moments, "optimizer")
    if state.ema is not None:
        memory.relabel((each for each in state.ema.averages if each is not None), "EMA")


@contextmanager
def _fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Be one rank of a world without other processes."""
    fake_device()  # process groups look for the device when they are made
    dist.init_process_group(
        f"cpu:fake,{DEVICE_TYPE}:fake", store=FakeStore(), rank=rank, world_size=world_size
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _known_shapes(shape: list[int]) -> Iterator[None]:
    """Answer the exchange of shapes between stages, which has no values to receive."""
    exchange = P2PCommunicator._communicate_shapes

    def exchange_shapes(self: Any, *args: Any, **kwargs: Any) -> tuple[list[int], list[int]]:
        exchange(self, *args, **kwargs)
        return shape, shape

    with mock.patch.object(P2PCommunicator, "_communicate_shapes", exchange_shapes):
        yield
