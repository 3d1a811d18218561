"""Draws the schedules and orders of generation.

Every random number is a function of (seed, purpose, sample, slot), so a sample does not depend on
the others in its batch. Sources: arXiv 2506.01928, `algo.py` of its repository (ancestral schedule:
`_sample_schedule`; order: a random permutation with an ascending tail); arXiv 2607.01775 (sets).

Shape suffixes: T slots or positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...objectives.noise.orders import OrderLaw
from ...objectives.noise.schedule import LogLinearSchedule
from ...randomness.bits import random_bits, uniform
from ...randomness.purposes import Purpose

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RevealPlan:
    """The plan for the generation of one sample."""

    schedule: list[int]
    """Number of unknown tokens that each step reveals."""
    order_T: Int64
    """`order[slot] = position`: known positions, then unknown ones."""
    num_random: int = 0
    """Slots before the sequential phase, in random order (Eso-LM)."""


def draw_times(law: OrderLaw, seed: int, row: int, num_positions: int) -> npt.NDArray[np.float64]:
    """Draw the time of each position, float64 `[T]`; positions are revealed by falling time.

    Args:
        law: The distribution of orders.
        seed: Seed of the order.
        row: Number of the sample in the batch.
        num_positions: Number T of positions.

    Raises:
        ValueError: No staggered schedule of T positions has the sizes of the law.
    """
    if not law.fits(num_positions):
        raise ValueError(
            f"set_size {law.set_size} and max_set_size {law.max_set_size} have no staggered "
            f"schedule of {num_positions} positions"
        )
    # The first stream of the sample orders the diffusion phase.
    return law.times(random_bits(seed, Purpose.GENERATION_ORDER, row, num_positions, 1))


def plan_ancestral(
    seed: int, num_slots: int, num_known: int, alpha_0: float, steps: int
) -> tuple[list[int], int]:
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

    Returns:
        The schedule, and the number of slots before the sequential phase.
    """
    times = uniform(seed, Purpose.GENERATION_SCHEDULE, 0, num_slots)
    counts = np.bincount(_find_steps(times, alpha_0, steps), minlength=steps + 1)[:steps]
    num_random = int(counts.sum())
    remaining = np.maximum(np.cumsum(counts) - num_known, 0)
    revealed = np.diff(remaining, prepend=0)
    schedule = [int(count) for count in revealed if count]
    sequential = num_slots - num_known - sum(schedule)
    return schedule + [1] * sequential, num_random


def _find_steps(times: npt.NDArray[np.float64], alpha_0: float, steps: int) -> Int64:
    """Return the step of the ancestral chain in which uniform numbers reveal their tokens."""
    alphas = LogLinearSchedule(alpha_0).alpha(np.linspace(1.0, 0.0, steps + 1))
    revealed_by = 1.0 - (1.0 - alphas[1:]) / (1.0 - alphas[0])
    return np.searchsorted(revealed_by, times, side="right")


def count_random_slots(
    schedule: Sequence[int], num_slots: int, num_known: int, alpha_0: float
) -> int:
    """Return the slots before the sequential phase: steps count until `alpha_0 T` are known."""
    target = round(alpha_0 * num_slots)
    num_revealed = num_known
    for count in schedule:
        if num_revealed >= target:
            break
        num_revealed += count
    return max(target, num_revealed) if schedule else target


def draw_order(seed: int, row: int, is_known_T: Bool, num_random: int, law: OrderLaw) -> Int64:
    """Draw the permutation of one sample, int64 `[T]`: known positions, then unknown ones.

    Before slot `num_random` the order is random; from it on it is that of the sequential phase, as
    in training, where the prefix is random.

    Args:
        seed: Seed of the order.
        row: Number of the sample in the batch.
        is_known_T: Which positions are known.
        num_random: Number of slots in random order.
        law: The order of the sequential phase.
    """
    random_order = np.argsort(
        random_bits(seed, Purpose.GENERATION_ORDER, row, len(is_known_T)), kind="stable"
    )
    times_T = draw_times(law, seed, row, len(is_known_T))
    known = random_order[is_known_T[random_order]]
    unknown = random_order[~is_known_T[random_order]]
    first_sorted = max(num_random - len(known), 0)
    known[num_random:] = _sort_by_time(known[num_random:], times_T)
    unknown[first_sorted:] = _sort_by_time(unknown[first_sorted:], times_T)
    return np.concatenate([known, unknown]).astype(np.int64)


def _sort_by_time(positions: Int64, times_T: npt.NDArray[np.float64]) -> Int64:
    """Sort positions by descending time, equal times by position."""
    positions = np.sort(positions)
    return positions[np.argsort(-times_T[positions], kind="stable")]


def plan_sets(
    seed: int, row: int, is_known_T: Bool, law: OrderLaw, steps: int | None
) -> RevealPlan:
    """Plan by hitting times: a set has the tokens whose times are in the step's interval.

    Args:
        seed: Seed of the order.
        row: Number of the sample in the batch.
        is_known_T: Which positions are known.
        law: The distribution of the times.
        steps: Number of equal intervals of [0, 1]; None: each token is a set.
    """
    times_T = draw_times(law, seed, row, len(is_known_T))
    known = _sort_by_time(np.flatnonzero(is_known_T), times_T)
    unknown = _sort_by_time(np.flatnonzero(~is_known_T), times_T)
    if steps is None:
        schedule = [1] * len(unknown)
    else:
        interval = np.clip(((1.0 - times_T[unknown]) * steps).astype(np.int64), 0, steps - 1)
        schedule = _count_groups(interval)
    return RevealPlan(schedule=schedule, order_T=np.concatenate([known, unknown]))


def plan_blocks(seed: int, row: int, is_known_T: Bool, block_size: int, steps: int) -> RevealPlan:
    """Plan block after block, each by ancestral diffusion steps from t = 1 to 0.

    A step in which the ancestral chain reveals no token is left out, because the network's
    predictions do not change by it. The order within a block is uniformly random.

    Args:
        seed: Seed of reveal times and order.
        row: Number of the sample in the batch.
        is_known_T: Which positions are known.
        block_size: Number of positions in a block.
        steps: Time steps of the chain of each block.
    """
    num_positions = len(is_known_T)
    times_T = uniform(seed, Purpose.GENERATION_SCHEDULE, row, num_positions)
    step_T = np.minimum(_find_steps(times_T, 1.0, steps), steps - 1)
    bits_T = random_bits(seed, Purpose.GENERATION_ORDER, row, num_positions)
    group_T = np.arange(num_positions) // block_size * steps + step_T
    order_T = np.lexsort((bits_T, group_T))
    unknown = order_T[~is_known_T[order_T]]
    return RevealPlan(
        schedule=_count_groups(group_T[unknown]),
        order_T=np.concatenate([np.flatnonzero(is_known_T), unknown]),
    )


def _count_groups(group: Int64) -> list[int]:
    """Return the sizes of the runs of equal numbers."""
    changes = np.flatnonzero(np.diff(group)) + 1
    edges = [0, *changes.tolist(), len(group)]
    return [end - begin for begin, end in zip(edges, edges[1:], strict=False) if end > begin]
