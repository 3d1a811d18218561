"""Schedules and orders of generation, and the random numbers behind them.

Every number is a function of (seed, purpose, row, slot), so a row's sample does not depend on which
other rows are in the batch. Sources: arXiv 2506.01928, `algo.py` of its repository (ancestral
schedule: `_sample_schedule`; order: a random permutation with an ascending tail).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..objectives.schedule import LogLinearSchedule
from ..randomness.bits import random_bits, uniform
from ..randomness.purposes import Purpose

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class RevealPlan:
    """How one row is generated."""

    schedule: list[int]
    """Unknown tokens revealed in each step."""
    num_random: int
    """Slots from this one on ascend in position, the known and the unknown apart."""


def plan_ancestral(
    seed: int, num_slots: int, num_known: int, alpha_0: float, steps: int
) -> RevealPlan:
    """Draw the paper's schedule: ancestral diffusion steps, then one token at a time.

    The chain of binomials over `t = 1 .. 1/steps` is drawn as one reveal time per token. Known
    tokens count as those that the chain revealed first, so the number of tokens that diffusion
    leaves to the sequential phase is that of training. It depends on the seed and the counts, and
    not on the row.
    """
    alphas = LogLinearSchedule(alpha_0).alpha(np.linspace(1.0, 0.0, steps + 1))
    revealed_by = 1.0 - (1.0 - alphas[1:]) / (1.0 - alphas[0])
    times = uniform(seed, Purpose.GENERATION_SCHEDULE, 0, num_slots)
    step_of_token = np.searchsorted(revealed_by, times, side="right")
    counts = np.bincount(step_of_token, minlength=steps + 1)[:steps]
    num_random = int(counts.sum())
    remaining = np.maximum(np.cumsum(counts) - num_known, 0)
    revealed = np.diff(remaining, prepend=0)
    schedule = [int(count) for count in revealed if count]
    sequential = num_slots - num_known - sum(schedule)
    return RevealPlan(schedule=schedule + [1] * sequential, num_random=num_random)


def plan_given(
    schedule: Sequence[int], num_slots: int, num_known: int, alpha_0: float
) -> RevealPlan:
    """Use a given schedule; the order is random until `alpha_0 T` slots are known."""
    target = round(alpha_0 * num_slots)
    num_revealed = num_known
    for count in schedule:
        if num_revealed >= target:
            break
        num_revealed += count
    return RevealPlan(
        schedule=list(schedule), num_random=max(target, num_revealed) if schedule else target
    )


def draw_order(seed: int, row: int, is_known_T: npt.NDArray[np.bool_], num_random: int) -> Int64:
    """Draw a row's permutation: known positions, then unknown ones.

    Up to slot `num_random` the order is random; behind it positions ascend, as in the training of
    the sequential phase, where the prefix is random.
    """
    random_order = np.argsort(
        random_bits(seed, Purpose.GENERATION_ORDER, row, len(is_known_T)), kind="stable"
    )
    known = random_order[is_known_T[random_order]]
    unknown = random_order[~is_known_T[random_order]]
    first_sorted = max(num_random - len(known), 0)
    known[num_random:].sort()
    unknown[first_sorted:].sort()
    return np.concatenate([known, unknown]).astype(np.int64)
