"""One rank of a pipeline stage on the fake GPU: its build, steps of the usual size, the largest."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from unittest import mock

import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_eso.batches.rows import MicroBatch
from megatron_eso.config.sections import Config
from megatron_eso.estimates.gpus import Gpu
from megatron_eso.simulation.collectives import Collective
from megatron_eso.simulation.fake_gpu import DEVICE_TYPE, fake_device, fake_gpu
from megatron_eso.simulation.memory import Memory
from megatron_eso.simulation.micro_batches import (
    Kind,
    build_run_objective,
    copy_to_fake,
    find_largest,
)
from megatron_eso.simulation.parts import ONCE
from megatron_eso.simulation.recorder import PartUse, Recorder
from megatron_eso.simulation.timeline import Timeline
from megatron_eso.training.distributed.parallel import model_parallel_groups
from megatron_eso.training.steps.batches import StepPlan
from megatron_eso.training.steps.step import train_step
from megatron_eso.training.steps.train_state import TrainState, build_empty_state

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
        """Seconds that the kernels of a micro-batch take."""
        return sum(use.seconds for use in self.parts.values())

    @property
    def seconds_once(self) -> float:
        """Seconds that the kernels take that come once in a step."""
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
        peak_part: The part of the step at that moment.
        waits: How often the host waits in a step of `num_micro_batches`, by reason and place.
        collectives: Collectives of a step of `num_micro_batches`.
        num_micro_batches: Micro-batches of the simulated step.
    """

    rank: int
    num_parameters: int
    step: StepUse
    held: dict[str, int]
    peak: dict[str, int]
    peak_part: str
    waits: dict[tuple[str, str], int]
    collectives: dict[Collective, int]
    num_micro_batches: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rank:
    """A rank of a run on the fake GPU, with its model, its optimizer and its process groups."""

    config: Config
    world_size: int
    stage: int
    state: TrainState
    groups: ProcessGroupCollection
    recorder: Recorder
    mode: FakeTensorMode

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step of the run."""
        train = self.config.train
        ranks: int = self.groups.dp.size()
        return train.global_batch_size // (train.micro_batch_size * ranks)

    @property
    def num_usual(self) -> int:
        """Micro-batches of a simulated step that stand for any number of them."""
        num_stages: int = self.groups.pp.size()
        return min(num_stages, self.num_micro_batches)

    @property
    def num_largest(self) -> int:
        """Number of micro-batches of a step in which the most are in flight at once."""
        num_stages: int = self.groups.pp.size()
        return 1 if num_stages == 1 else min(2 * num_stages, self.num_micro_batches)

    def take_step(self, micro_batch: MicroBatch, number: int) -> None:
        """Take a step with `number` equal micro-batches, recorded from its start."""
        config = self.config
        objective = build_run_objective(config)
        micro_batches = [copy_to_fake(micro_batch, self.mode)] * number
        rows = len(micro_batch.rows.tokens_R) // config.parallel.row_multiple
        self.recorder.restart()
        with _known_shapes([rows, 1, config.model.hidden_size]):
            result = train_step(
                self.state,
                StepPlan(micro_batches=micro_batches, tokens=(1,) * len(objective.phases)),
                objective,
                config.train,
                self.groups,
                flops_per_token=1.0,
                dropout_seed=config.run.seed if config.model.hidden_dropout > 0 else None,
            )
        assert not result.skipped, result


@contextmanager
def build_rank(
    config: Config, gpu: Gpu, world_size: int, stage: int, kinds: list[Kind]
) -> Iterator[Rank]:
    """Build the first rank of a pipeline stage on the fake GPU, with its optimizer's state.

    No other process takes part: the process groups are torch's `fake` ones.

    Args:
        config: Its vocabulary is known.
        gpu: The GPU that all ranks have.
        world_size: Number of ranks.
        stage: The pipeline stage.
        kinds: Micro-batches of the run.
    """
    first = stage * (world_size // config.parallel.pipeline_model_parallel_size)
    recorder = Recorder(gpu)
    with ExitStack() as stack:
        stack.enter_context(_fake_world(first, world_size))
        mode = stack.enter_context(fake_gpu(recorder.wait))
        groups = stack.enter_context(model_parallel_groups(config.parallel))
        stack.enter_context(recorder)
        rank = Rank(
            config=config,
            world_size=world_size,
            stage=stage,
            state=build_empty_state(config, groups),
            groups=groups,
            recorder=recorder,
            mode=mode,
        )
        # The first step makes the optimizer's moments, which stay.
        rank.take_step(kinds[0].tiny, rank.num_usual)
        label_state(recorder.memory, rank.state)
        yield rank


def simulate_stage(
    config: Config, gpu: Gpu, world_size: int, stage: int, kinds: list[Kind]
) -> StageUse:
    """Simulate steps of the first rank of a pipeline stage; arguments as for `build_rank`."""
    with build_rank(config, gpu, world_size, stage, kinds) as rank:
        recorder = rank.recorder
        held = recorder.memory.held
        # The time of a step: the mean over the kinds of micro-batches.
        use = StepUse()
        for kind in kinds:
            rank.take_step(kind.usual, rank.num_usual)
            use.add(recorder, rank.num_usual, kind.share)
        waits, collectives = dict(recorder.waits), dict(recorder.collectives)
        # Its memory: that of the largest micro-batches.
        rank.take_step(find_largest(kinds), rank.num_largest)
        return StageUse(
            rank=dist.get_rank(),
            num_parameters=sum(each.model.numel() for each in rank.state.parameters),
            step=use,
            held=held,
            peak=recorder.memory.peak,
            peak_part=recorder.peak_part,
            waits=waits,
            collectives=collectives,
            num_micro_batches=rank.num_usual,
        )


def label_state(memory: Memory, state: TrainState) -> None:
    """Label the storages that stay between steps by their purpose."""
    buffers = [buffer for chunk in state.chunks for buffer in chunk.buffers]
    weights = [buffer.param_data for buffer in buffers if buffer.param_data is not None]
    weights += [parameter.data for chunk in state.chunks for parameter in chunk.parameters()]
    weights += [buffer for chunk in state.chunks for buffer in chunk.module.buffers()]
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
    memory.relabel(weights, "weights")  # in float32 they are the main parameters themselves
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
