"""Schedules and orders of generation, and the random numbers behind them.

Every number is a function of (seed, purpose, row, slot), so a row's sample does not depend on which
other rows are in the batch. Sources: arXiv 2506.01928, `algo.py` of its repository (ancestral
schedule: `_sample_schedule`; order: a random permutation with an ascending tail).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

NOISE_FLOOR = 1e-3
"""The reference's schedule: alpha(t) = alpha_0 (1 - (1 - 1e-3) t)."""

Int64 = npt.NDArray[np.int64]


class Purpose(IntEnum):
    """What random bits are for; part of their key, so a number never changes its meaning."""

    SCHEDULE = 1001
    ORDER = 1002
    TOKEN = 1003


def random_bits(
    seed: int, purpose: Purpose, row: int, slot: int, count: int
) -> npt.NDArray[np.uint64]:
    """Raw bits of Philox keyed by (seed, purpose) at the counter (row, slot)."""
    bits = np.random.Philox(key=[seed, purpose], counter=[0, 0, row, slot]).random_raw(count)
    return np.asarray(bits, dtype=np.uint64)


def uniforms(
    seed: int, purpose: Purpose, row: int, slot: int, count: int
) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) with 53 bits."""
    bits = random_bits(seed, purpose, row, slot, count) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPlan:
    """How one row is generated."""

    schedule: list[int]
    """Unknown tokens revealed in each step."""
    num_random: int
    """Slots from this one on ascend in position, the known and the unknown apart."""


def plan_ancestral(
    seed: int, num_slots: int, num_known: int, alpha_0: float, steps: int
) -> RowPlan:
    """Draw the paper's schedule: ancestral diffusion steps, then one token at a time.

    The chain of binomials over `t = 1 .. 1/steps` is drawn as one reveal time per token. Known
    tokens count as those that the chain revealed first, so the number of tokens that diffusion
    leaves to the sequential phase is that of training. It depends on the seed and the counts, and
    not on the row.
    """
    alphas = alpha_0 * (1.0 - (1.0 - NOISE_FLOOR) * np.linspace(1.0, 0.0, steps + 1))
    revealed_by = 1.0 - (1.0 - alphas[1:]) / (1.0 - alphas[0])
    times = uniforms(seed, Purpose.SCHEDULE, 0, 0, num_slots)
    step_of_token = np.searchsorted(revealed_by, times, side="right")
    counts = np.bincount(step_of_token, minlength=steps + 1)[:steps]
    num_random = int(counts.sum())
    remaining = np.maximum(np.cumsum(counts) - num_known, 0)
    revealed = np.diff(remaining, prepend=0)
    schedule = [int(count) for count in revealed if count]
    sequential = num_slots - num_known - sum(schedule)
    return RowPlan(schedule=schedule + [1] * sequential, num_random=num_random)


def plan_given(schedule: Sequence[int], num_slots: int, num_known: int, alpha_0: float) -> RowPlan:
    """Use a given schedule; the order is random until `alpha_0 T` slots are known."""
    target = round(alpha_0 * num_slots)
    num_revealed = num_known
    for count in schedule:
        if num_revealed >= target:
            break
        num_revealed += count
    return RowPlan(
        schedule=list(schedule), num_random=max(target, num_revealed) if schedule else target
    )


def draw_order(seed: int, row: int, is_known_T: npt.NDArray[np.bool_], num_random: int) -> Int64:
    """Draw a row's permutation: known positions, then unknown ones.

    Up to slot `num_random` the order is random; behind it positions ascend, as in the training of
    the sequential phase, where the prefix is random.
    """
    random_order = np.argsort(
        random_bits(seed, Purpose.ORDER, row, 0, len(is_known_T)), kind="stable"
    )
    known = random_order[is_known_T[random_order]]
    unknown = random_order[~is_known_T[random_order]]
    first_sorted = max(num_random - len(known), 0)
    known[num_random:].sort()
    unknown[first_sorted:].sort()
    return np.concatenate([known, unknown]).astype(np.int64)
