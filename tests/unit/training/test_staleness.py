"""The state that must change when the network's parameter changes, and the state that need not."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_eso.training.checkpointing.staleness import SMALLEST, StateSample, find_still
from megatron_eso.training.optimization.tensor_parts import TensorPart

DECAY = 0.9999
KINDS = ("param", "exp_avg", "exp_avg_sq", "ema")
PARTS = {
    kind: [TensorPart(f"{kind}.{name}", (2,), (0,), torch.zeros(2)) for name in "ab"]
    for kind in KINDS
}
"""Two parts of two elements of each kind of state."""


def make_sample(num_updates: int = 0, **values: list[float]) -> StateSample:
    moved = values.pop("network", [0.0, 0.0, 0.0, 0.0])
    ones = dict.fromkeys(KINDS, [1.0, 1.0, 1.0, 1.0])
    kinds = {kind: np.array(each, np.float32) for kind, each in (ones | values).items()}
    return StateSample(
        kinds=kinds,
        network_S=np.array(moved, np.float32),
        starts_P=np.array([0, 2]),
        num_updates=num_updates,
        rollbacks=0,
    )


def add(sample: StateSample, num_updates: int = 1, **changes: list[float]) -> StateSample:
    kinds = {
        kind: (values + np.array(changes.get(kind, [0.0] * 4), np.float32)).astype(np.float32)
        for kind, values in sample.kinds.items()
    }
    network_S = sample.network_S + np.array(changes.get("network", [0.0] * 4), np.float32)
    return dataclasses.replace(sample, kinds=kinds, network_S=network_S, num_updates=num_updates)


FIRST, SECOND, BOTH = [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]
ALL = dict.fromkeys(KINDS, BOTH)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("network", "still"), [(FIRST, ["a"]), (SECOND, ["b"]), (BOTH, [*"ab"])])
def test_what_stands_still_is_named(kind: str, network: list[float], still: list[str]) -> None:
    before = make_sample()
    others = {other: BOTH for other in KINDS if other != kind}
    now = add(before, network=network, **others)
    assert find_still(before, now, PARTS, DECAY) == [f"{kind}.{name}" for name in still]


def test_what_moves_with_the_network_is_sound() -> None:
    before = make_sample()
    assert find_still(before, add(before, network=BOTH, **ALL), PARTS, DECAY) == []


def test_nothing_is_expected_where_the_network_stands_or_nothing_was_updated() -> None:
    before = make_sample()
    assert find_still(before, add(before), PARTS, DECAY) == []
    unchanged = add(before, num_updates=0, network=BOTH)
    assert find_still(before, unchanged, PARTS, DECAY) == []
    back = dataclasses.replace(add(before, network=BOTH), rollbacks=1)
    assert find_still(before, back, PARTS, DECAY) == []


@pytest.mark.parametrize(
    ("value", "is_suspect"),
    [(0.0, False), (SMALLEST / 4, False), (2 * SMALLEST, True), (-1.0, True), (np.nan, False)],
)
def test_a_moment_of_no_gradient_or_too_small_to_decay_may_stand_still(
    value: float, is_suspect: bool
) -> None:
    moments = {kind: [value] * 4 for kind in ("exp_avg", "exp_avg_sq")}
    before = make_sample(**moments)
    now = add(before, network=BOTH, param=BOTH, ema=BOTH)
    names = [f"{kind}.{name}" for kind in moments for name in "ab"]
    assert find_still(before, now, PARTS, DECAY) == (names if is_suspect else [])


@pytest.mark.parametrize(("distance", "is_suspect"), [(1e-4, False), (1e-2, True)])
def test_an_average_that_rounds_to_itself_may_stand_still(
    distance: float, is_suspect: bool
) -> None:
    """Add a share of 1 - DECAY of the distance to the parameter at each update."""
    before = make_sample(param=[1 + distance / 2] * 4)
    now = add(before, network=BOTH, param=[distance / 2] * 4, exp_avg=BOTH, exp_avg_sq=BOTH)
    names = ["ema.a", "ema.b"]
    assert find_still(before, now, PARTS, DECAY) == (names if is_suspect else [])
