"""A step of the whole run, put together from ranks that were simulated one by one."""

from dataclasses import dataclass
from itertools import accumulate

from megatron_eso.config.sections import Config
from megatron_eso.estimates.flops import training_flops_per_token
from megatron_eso.estimates.gpus import Gpu
from megatron_eso.simulation.micro_batches import build_run_objective, plan_kinds
from megatron_eso.simulation.stage import StageUse, simulate_stage


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """A simulated run.

    Attributes:
        gpu: The GPU of every rank.
        world_size: Number of ranks.
        stages: The first pipeline stage, and the last one where there are several.
        num_micro_batches: Micro-batches of a step on each rank.
        bubble: Seconds of a step that a stage waits for others to begin or to end.
        tokens: Tokens of a step.
        num_steps: Steps of the run.
        model_flops: FLOPs that the objective needs for a step, on each rank.
    """

    gpu: Gpu
    world_size: int
    stages: tuple[StageUse, ...]
    num_micro_batches: int
    bubble: float
    tokens: int
    num_steps: int
    model_flops: float

    @property
    def slowest(self) -> StageUse:
        """The stage whose micro-batches take longest."""
        return max(self.stages, key=lambda stage: stage.step.seconds)

    @property
    def fullest(self) -> StageUse:
        """The stage with the highest peak of memory."""
        return max(self.stages, key=lambda stage: sum(stage.peak.values()))

    @property
    def kernels_seconds(self) -> float:
        """Forward and backward of a step, kernels alone."""
        return self.num_micro_batches * self.slowest.step.seconds

    @property
    def update_seconds(self) -> float:
        """Kernels that come once in a step: the optimizer and what belongs to it."""
        return self.slowest.step.seconds_once

    @property
    def exposed_seconds(self) -> float:
        """Time of a step that kernels wait for collectives."""
        use = self.slowest.step
        per_micro_batch = sum(use.exposed.values())
        return self.num_micro_batches * per_micro_batch + sum(use.exposed_once.values())

    @property
    def step_seconds(self) -> float:
        """A step, with everything."""
        return self.kernels_seconds + self.update_seconds + self.exposed_seconds + self.bubble

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second and GPU."""
        return self.tokens / self.step_seconds / self.world_size

    @property
    def hours(self) -> float:
        """Hours of `train.num_steps` steps, without validation and checkpoints."""
        return self.step_seconds * self.num_steps / 3600

    @property
    def gpu_hours(self) -> float:
        """GPU hours of `train.num_steps` steps, over all ranks."""
        return self.hours * self.world_size

    @property
    def utilizations(self) -> dict[str, float]:
        """Model FLOPs utilization with more and more of what a step takes."""
        seconds = {
            "kernels": self.kernels_seconds,
            "with_optimizer": self.update_seconds,
            "with_communication": self.exposed_seconds,
            "with_bubble": self.bubble,
        }
        totals = accumulate(seconds.values())
        peak = self.gpu.bf16_flops
        return {
            name: self.model_flops / total / peak
            for name, total in zip(seconds, totals, strict=True)
        }


def simulate(config: Config, gpu: Gpu, world_size: int) -> Simulation:
    """Simulate a step of the first and the last pipeline stage of a run.

    Args:
        config: A configuration that `check_layout` accepts, with its vocabulary.
        gpu: The GPU of every rank.
        world_size: Number of ranks.
    """
    parallel, train = config.parallel, config.train
    num_stages = parallel.pipeline_model_parallel_size
    data_parallel_size = world_size // parallel.model_parallel_size
    kinds = plan_kinds(config, data_parallel_size)
    # The first and the last stage have embedding and head; stages between them hold less.
    stages = tuple(
        simulate_stage(config, gpu, world_size, stage, kinds)
        for stage in sorted({0, num_stages - 1})
    )
    slowest = max(each.step.seconds + sum(each.step.exposed.values()) for each in stages)
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    tokens = train.global_batch_size * config.data.sequence_length
    # The FLOPs that the objective needs, for the utilization.
    per_token = training_flops_per_token(
        config.model,
        config.data.vocabulary.size,
        build_run_objective(config),
        config.data.sequence_length,
    )
    return Simulation(
        gpu=gpu,
        world_size=world_size,
        stages=stages,
        num_micro_batches=train.global_batch_size // train.micro_batch_size // data_parallel_size,
        bubble=(num_stages - 1) / chunks * slowest,
        tokens=tokens,
        num_steps=train.num_steps,
        model_flops=per_token * tokens / world_size,
    )
