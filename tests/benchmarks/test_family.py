"""CPU time and FLOPs of a training step of every objective, relative to AR."""

import os
from pathlib import Path

import pytest

from tests.ranks.benchmarks import compare_objectives
from tests.support.training import ESO_LM_A, Overrides
from tests.support.world import World

VOCAB_SIZE = 4096
MODEL: Overrides = {
    "model.num_layers": 4,
    "model.hidden_size": 256,
    "train.num_steps": 100,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
}


NEXT: Overrides = {"objective.sequential_prediction": '"next"'}


def eso_lm(alpha_0: float) -> Overrides:
    return {"objective.alpha_0": alpha_0}


def name(objective: str, **keys: int) -> Overrides:
    return {"objective.name": f'"{objective}"', **{f"objective.{k}": v for k, v in keys.items()}}


FAMILY: dict[str, Overrides] = {
    "ar": name("ar"),
    "mdlm": name("mdlm"),
    "eso_lm b, alpha_0 = 1": eso_lm(1.0),
    "eso_lm b, alpha_0 = 0.125": eso_lm(0.125),
    "eso_lm b, alpha_0 = 0": eso_lm(0.0),
    "eso_lm b, alpha_0 = 0.25": eso_lm(0.25),
    "eso_lm b, alpha_0 = 0.5": eso_lm(0.5),
    "eso_lm next, alpha_0 = 0.125": eso_lm(0.125) | NEXT,
    "eso_lm next, alpha_0 = 0.25": eso_lm(0.25) | NEXT,
    "eso_lm next, alpha_0 = 0.5": eso_lm(0.5) | NEXT,
    "eso_lm a, alpha_0 = 1": eso_lm(1.0) | ESO_LM_A,
    "eso_lm a, alpha_0 = 0.125": eso_lm(0.125) | ESO_LM_A,
    "bd3_lm, block_size = 16": name("bd3_lm", block_size=16),
    "bd3_lm, block_size = 4": name("bd3_lm", block_size=4),
    "set_dlm": name("set_dlm"),
    "any_order_ar": name("any_order_ar"),
}


@pytest.mark.bench
@pytest.mark.parametrize("length", [256, 1024])
def test_time_of_a_step_of_every_objective(
    world: World, tiny_data: Path, tmp_path: Path, length: int
) -> None:
    overrides = MODEL | {"data.sequence_length": length}
    (measured,) = world.run(
        compare_objectives, 1, tmp_path, tiny_data, overrides, FAMILY, VOCAB_SIZE
    )
    ar_seconds, ar_flops = measured["ar"]
    print(f"\nT={length}, vocabulary {VOCAB_SIZE}, load {os.getloadavg()[0]:.1f}")
    for objective, (seconds, flops) in measured.items():
        print(
            f"{objective:28s} {seconds:7.3f} s a step, {flops / seconds / 1e9:4.0f} GFLOP/s; "
            f"over AR: time {seconds / ar_seconds:.2f}x, FLOPs {flops / ar_flops:.2f}x"
        )
