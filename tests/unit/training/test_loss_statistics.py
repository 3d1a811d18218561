"""Moving statistics against their definition, and what they call far off."""

import math

import numpy as np

from megatron_eso.runs.counters import DECAY, WARMUP_STEPS, MovingStatistics


def test_the_weights_are_those_of_the_definition() -> None:
    values = np.random.default_rng(0).normal(3.0, 0.5, 500)
    statistics = MovingStatistics()
    for value in values:
        statistics = statistics.add(float(value))
    # Each step's weight is taken from those before it.
    weights = np.zeros(0)
    for count in range(len(values)):
        weight = max(1 - DECAY, 1 / (count + 1))
        weights = np.append(weights * (1 - weight), weight)
    mean = (weights * values).sum()
    assert math.isclose(weights.sum(), 1.0, rel_tol=1e-12)
    assert math.isclose(statistics.mean, mean, rel_tol=1e-12)
    variance = (weights * (values - mean) ** 2).sum()
    assert math.isclose(statistics.variance, variance, rel_tol=1e-9)


def test_a_spike_is_far_off_and_noise_is_not() -> None:
    draw = np.random.default_rng(1)
    statistics = MovingStatistics()
    for number in range(1000):
        value = float(draw.normal(3.0, 0.1))
        assert statistics.deviations(value) < 6.0
        assert number >= WARMUP_STEPS or statistics.deviations(1e9) == 0.0
        statistics = statistics.add(value)
    assert statistics.deviations(5.0) > 10.0
    assert statistics.deviations(math.nan) == math.inf
