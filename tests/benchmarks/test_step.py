"""Time and FLOPs of a training step at several alpha_0, and of the diffusion phase alone."""

import statistics
import time
from pathlib import Path

import pytest

from megatron_eso.estimates.flops import training_flops_per_token
from tests.support.planning import objective_of
from tests.support.training import Overrides, open_batches, take_step, tiny_config
from tests.support.world import World

NUM_STEPS = 5
MODEL: Overrides = {
    "model.num_layers": 4,
    "model.hidden_size": 256,
    "data.sequence_length": 256,
    "train.num_steps": 100,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 4,
}


def time_steps(run: Path, data: Path, overrides: Overrides) -> float:
    """Median seconds of a step on one rank, after a first one."""
    from megatron_eso.training.distributed.cpu_backend import install_cpu_backend

    install_cpu_backend()
    from megatron_eso.training.distributed.parallel import model_parallel_groups
    from megatron_eso.training.steps.train_state import build_train_state

    config = tiny_config(run, data, overrides)
    seconds = []
    with model_parallel_groups(config.parallel) as groups:
        state = build_train_state(config, groups)
        batches = open_batches(config, groups.dp.size())
        for _ in range(NUM_STEPS + 1):
            began = time.perf_counter()
            take_step(config, state, batches, groups)
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


@pytest.mark.bench
def test_the_sequential_phase_costs_what_its_flops_say(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
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
