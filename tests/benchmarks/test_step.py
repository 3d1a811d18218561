"""Time and FLOPs of a training step at several alpha_0, and of the diffusion phase alone."""

from pathlib import Path

import pytest

from megatron_eso.estimates.flops import training_flops_per_token
from tests.ranks.benchmarks import time_steps
from tests.support.planning import objective_of
from tests.support.training import Overrides, tiny_config
from tests.support.world import World

MODEL: Overrides = {
    "model.num_layers": 4,
    "model.hidden_size": 256,
    "data.sequence_length": 256,
    "train.num_steps": 100,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 4,
}


@pytest.mark.bench
def test_time_of_the_sequential_phase(world: World, tiny_data: Path, tmp_path: Path) -> None:
    baseline = None
    for alpha_0 in (1.0, 0.5, 0.25, 0.125, 0.0):
        overrides = MODEL | {"objective.alpha_0": alpha_0}
        (seconds,) = world.run(time_steps, 1, tmp_path, tiny_data, overrides)
        config = tiny_config(tmp_path, tiny_data, overrides)
        flops = training_flops_per_token(
            config.model,
            config.data.vocabulary.size,
            objective_of(config),
            config.data.sequence_length,
        )
        baseline = baseline or (seconds, flops)
        tokens = config.train.global_batch_size * config.data.sequence_length
        print(
            f"alpha_0={alpha_0}: {seconds:.3f} s a step, {flops * tokens / seconds / 1e9:.0f} "
            f"GFLOP/s; over alpha_0=1: time {seconds / baseline[0]:.2f}x, "
            f"FLOPs {flops / baseline[1]:.2f}x"
        )
