"""Learning rate, weight decay and average, compared with closed forms."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks.training import list_learning_rates, train_tiny
from tests.support.training import LAYOUTS, Overrides, read_checkpoint
from tests.support.world import World

pytestmark = pytest.mark.parallel

NUM_STEPS, WARMUP, DECAY = 20, 4, 6
HIGH, LOW = 1e-2, 1e-3
SCHEDULE: Overrides = {
    "train.num_steps": NUM_STEPS,
    "optimizer.lr_warmup_steps": WARMUP,
    "optimizer.learning_rate": HIGH,
    "optimizer.min_learning_rate": LOW,
}


def constant(step: int) -> float:
    return HIGH


def cosine(step: int) -> float:
    done = (step - WARMUP) / (NUM_STEPS - WARMUP)
    return LOW + (HIGH - LOW) * (1 + math.cos(math.pi * done)) / 2


def warm_stable_decay(step: int) -> float:
    done = max(0.0, step - (NUM_STEPS - DECAY)) / DECAY
    return LOW + (HIGH - LOW) * (1 - done)


@pytest.mark.parametrize(
    ("style", "expected"),
    [("constant", constant), ("cosine", cosine), ("WSD", warm_stable_decay)],
)
def test_learning_rate_is_a_function_of_the_step(
    style: str, expected: Any, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    overrides = SCHEDULE | {"optimizer.lr_decay_style": f'"{style}"'}
    if style == "WSD":
        overrides |= {"optimizer.lr_wsd_decay_steps": DECAY}
    rates, resumed = world.run(list_learning_rates, 1, tmp_path, tiny_data, overrides)[0]
    for step, rate in enumerate(rates):
        wanted = HIGH * step / WARMUP if step < WARMUP else expected(step)
        assert rate == pytest.approx(wanted), step
    assert resumed == rates[NUM_STEPS // 2]


@pytest.mark.parametrize("exclude", ["biases_and_norms", "none"])
def test_weight_decay_leaves_out_what_it_should(
    exclude: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    """Decay strongly without a gradient step: parameters that decay shrink, the others stay."""
    rate, decay = 1e-4, 1e3  # Adam moves by the rate at most, decay multiplies by 0.9
    overrides: Overrides = {
        "optimizer.learning_rate": rate,
        "optimizer.weight_decay": decay,
        "optimizer.weight_decay_exclude": f'"{exclude}"',
        "model.head_bias": "true",
    }
    world.run(train_tiny, 1, tmp_path, tiny_data, overrides, 0)
    after = read_checkpoint(
        world.run(train_tiny, 1, tmp_path, tiny_data, overrides, 1)[0].checkpoint
    )
    before = read_checkpoint(tmp_path / "checkpoints" / "step_00000000")
    for name in (name for name in after if not name.startswith(("optimizer.", "ema."))):
        decays = exclude == "none" or after[name].dim() > 1
        factor = 1 - rate * decay if decays else 1.0
        torch.testing.assert_close(after[name], factor * before[name], rtol=1e-5, atol=2 * rate)


@pytest.mark.parametrize("layout", ["1 rank", "DP=2 distributed optimizer"])
def test_the_average_is_the_references(
    layout: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    num_ranks, overrides = LAYOUTS[layout]
    overrides = overrides | {"optimizer.ema_decay": 0.4}
    states = []
    for step in range(5):
        trained = world.run(train_tiny, num_ranks, tmp_path, tiny_data, overrides, step)[0]
        states.append(read_checkpoint(trained.checkpoint))
    names = [name for name in states[0] if not name.startswith(("optimizer.", "ema."))]
    for name in names:
        average = states[0][name].double()
        for update, state in enumerate(states[1:], 1):
            decay = min(0.4, (1 + update) / (10 + update))
            average = decay * average + (1 - decay) * state[name].double()
            torch.testing.assert_close(state[f"ema.{name}"].double(), average, rtol=1e-5, atol=1e-7)
