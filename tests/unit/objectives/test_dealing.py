"""Dealing of places to phases, ranks and micro-batches."""

import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_eso.batches.dealing import Dealing, PhaseSplit
from megatron_eso.errors import ConfigError

SHARES = [Fraction(0), Fraction(1), Fraction(1, 2), Fraction(3, 4), Fraction(1, 3), Fraction(7, 10)]

sizes = st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(1, 6))


@given(sizes, st.sampled_from(SHARES))
@settings(max_examples=300, deadline=None)
def test_every_place_is_dealt_once_and_ranks_have_equal_shapes(
    layout: tuple[int, int, int], share: Fraction
) -> None:
    num_micro_batches, micro_batch_size, data_parallel_size = layout
    global_batch_size = num_micro_batches * micro_batch_size * data_parallel_size
    assume(micro_batch_size * share % 1 == 0 or num_micro_batches * share % 1 == 0)
    dealing = Dealing(global_batch_size, micro_batch_size, data_parallel_size, float(share))
    ranks = [dealing.micro_batches(rank) for rank in range(data_parallel_size)]

    places = np.concatenate([places for batches in ranks for places in batches])
    assert sorted(places.tolist()) == list(range(global_batch_size))
    assert {len(batches) for batches in ranks} == {num_micro_batches}
    assert {len(places) for batches in ranks for places in batches} == {micro_batch_size}
    phases = [[dealing.split.phases(places).tolist() for places in batches] for batches in ranks]
    assert all(batches == phases[0] for batches in phases)
    assert all(phase == sorted(phase) for phase in phases[0])
    counts = [sum(phase) for phase in phases[0]]
    if micro_batch_size * share % 1 == 0:
        assert set(counts) == {micro_batch_size * (1 - share)}
    else:
        assert set(counts) <= {0, micro_batch_size}


@given(st.integers(1, 400), st.sampled_from(SHARES))
@settings(max_examples=200, deadline=None)
def test_phases_are_spread_evenly_over_places(multiple: int, share: Fraction) -> None:
    size = multiple * share.denominator
    is_diffusion = Dealing(size, 1, 1, float(share)).split.phases(np.arange(size)) == 0
    assert is_diffusion.sum() == size * share
    # Any consecutive places hold their share of diffusion samples to within one.
    excess = np.concatenate([[0.0], np.cumsum(is_diffusion - float(share))])
    assert excess.max() - excess.min() <= 1 + 1e-9


def test_single_phase_micro_batches_alternate_evenly() -> None:
    dealing = Dealing(16, 1, 2, 0.75)
    for rank in range(2):
        kinds = [bool(dealing.split.phases(places)[0]) for places in dealing.micro_batches(rank)]
        assert kinds == [True, False, False, False] * 2


def test_a_places_phase_depends_on_no_layout() -> None:
    expected = Dealing(24, 1, 1, 0.5).split.phases(np.arange(24))
    for micro_batch_size, data_parallel_size in [(2, 3), (1, 6), (4, 2), (12, 2), (3, 4)]:
        dealing = Dealing(24, micro_batch_size, data_parallel_size, 0.5)
        assert np.array_equal(dealing.split.phases(np.arange(24)), expected)
        assert [int(dealing.split.phases(p)) for p in range(24)] == expected.tolist()


def test_diffusion_places_are_numbered_without_gaps() -> None:
    split = PhaseSplit(20, 0.7)
    places = np.flatnonzero(split.phases(np.arange(20)) == 0)
    assert split.numbers_in_first(places).tolist() == list(range(14))
    assert split.num_first == 14


@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 4), st.sampled_from(SHARES))
@settings(max_examples=300, deadline=None)
def test_sizes_that_cannot_be_dealt_are_refused_and_the_named_ones_can(
    global_batch_size: int, micro_batch_size: int, data_parallel_size: int, share: Fraction
) -> None:
    split = float(share)
    num_samples = global_batch_size * share
    can = global_batch_size % (micro_batch_size * data_parallel_size) == 0 and (
        micro_batch_size * share % 1 == 0
        or num_samples % (micro_batch_size * data_parallel_size) == 0
    )
    if can:
        Dealing(global_batch_size, micro_batch_size, data_parallel_size, split)
        return
    with pytest.raises(ConfigError) as caught:
        Dealing(global_batch_size, micro_batch_size, data_parallel_size, split)
    message = str(caught.value)
    assert "\n" not in message
    named = re.search(r"take a multiple of (\d+) \(([\d or]+)\)", message)
    assert named
    for size in (named[1], *named[2].split(" or ")):
        Dealing(int(size), micro_batch_size, data_parallel_size, split)
    micro_batches = re.search(r", or train\.micro_batch_size = ([\d or]+)$", message)
    for size in micro_batches[1].split(" or ") if micro_batches else ():
        Dealing(global_batch_size, int(size), data_parallel_size, split)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ((0, 1, 1, 0.5), "global_batch_size"),
        ((8, 0, 1, 0.5), "micro_batch_size"),
        ((8, 1, 1, 1.5), "batch_split"),
        ((8, 1, 1, -0.1), "batch_split"),
    ],
)
def test_sizes_out_of_range_are_refused_by_name(
    arguments: tuple[int, int, int, float], key: str
) -> None:
    with pytest.raises(ConfigError, match=key):
        Dealing(*arguments)


def test_a_rank_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="data_parallel_rank 2"):
        Dealing(4, 1, 2, 0.5).micro_batches(2)
