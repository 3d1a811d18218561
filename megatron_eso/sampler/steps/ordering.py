"""Draws the schedules and orders of generation.

Every random number is a function of (seed, purpose, sample, slot), so a sample does not depend on
the others in its batch. Sources: arXiv 2506.01928, `algo.py` of its repository (ancestral schedule:
`_sample_schedule`; order: a random permutation with an ascending tail).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..objectives.noise.schedule import LogLinearSchedule
from ..randomness.bits import random_bits, uniform
from ..randomness.purposes import Purpose

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class RevealPlan:
    """The plan for the generation of one sample."""

    schedule: list[int]
    """Number of unknown tokens that each step reveals."""
    num_random: int
    """Slot from which positions ascend, among known and among unknown tokens."""


def plan_ancestral(
    seed: int, num_slots: int, num_known: int, alpha_0: float, steps: int
) -> RevealPlan:
    """Draw the paper's schedule: ancestral diffusion steps, then one token at a time.

    The chain of binomials over `t = 1 .. 1/steps` is drawn as one reveal time per token. Known
    tokens count as those that the chain revealed first, so the diffusion phase leaves as many
    tokens to the sequential phase as in training.

    Args:
        seed: Seed of the reveal times.
        num_slots: Number T of slots.
        num_known: Number of known tokens.
        alpha_0: Share of the tokens that the diffusion phase reveals.
        steps: Time steps of the chain.
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
    """Plan by a given schedule; the order is random until `alpha_0 T` slots are known."""
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
    """Draw the permutation of one sample, int64 `[T]`: known positions, then unknown ones.

    Before slot `num_random` the order is random; from it on positions ascend, as in the training of
    the sequential phase, where the prefix is random.

    Args:
        seed: Seed of the order.
        row: Number of the sample in the batch.
        is_known_T: Which positions are known.
        num_random: Number of slots in random order.
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
