"""The order of samples: each data row once per epoch, in one order for any ranks and batches."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eso.data.samples.order import ORDER_VERSION, SampleOrder

LONG_ORDER_SHA256 = "ec6c1780310297ce4b4f99ee3cfe92705f917a31a3ecfe3bcff8c46fda99e915"
SEEDS = st.integers(0, 2**64 - 1)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, num_rows=st.integers(1, 3000), epoch=st.integers(0, 10**6))
def test_an_epoch_holds_every_row_once(seed: int, num_rows: int, epoch: int) -> None:
    samples = epoch * num_rows + np.arange(num_rows)
    rows = SampleOrder(seed, num_rows).rows(samples)
    assert np.array_equal(np.sort(rows), np.arange(num_rows))


@settings(max_examples=25, deadline=None)
@given(
    seed=SEEDS,
    num_rows=st.integers(1, 400),
    stages=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(1, 5), st.integers(1, 9)),
        min_size=1,
        max_size=6,
    ),
)
def test_changing_ranks_and_batches_loses_and_repeats_nothing(
    seed: int, num_rows: int, stages: list[tuple[int, int, int]]
) -> None:
    """Run parts of (data-parallel size, samples per rank and step, steps)."""
    consumed = 0
    seen: list[np.ndarray] = []
    for data_parallel_size, samples_per_rank, steps in stages:
        global_batch_size = data_parallel_size * samples_per_rank
        for _ in range(steps):
            places = consumed + np.arange(global_batch_size)
            order = SampleOrder(seed, num_rows)  # as after a resume
            seen += [
                order.rows(places[rank::data_parallel_size]) for rank in range(data_parallel_size)
            ]
            consumed += global_batch_size
    counts = np.bincount(np.concatenate(seen), minlength=num_rows)
    epochs, rest = divmod(consumed, num_rows)
    assert set(counts) <= {epochs, epochs + 1}
    assert np.count_nonzero(counts == epochs + 1) == rest
    straight = SampleOrder(seed, num_rows).rows(np.arange(consumed))
    assert np.array_equal(np.bincount(straight, minlength=num_rows), counts)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, num_rows=st.integers(1, 2**62 - 1), samples=st.lists(st.integers(0, 2**63 - 1)))
def test_a_sample_does_not_depend_on_the_samples_read_with_it(
    seed: int, num_rows: int, samples: list[int]
) -> None:
    order = SampleOrder(seed, num_rows)
    together = order.rows(np.array(samples, dtype=np.int64))
    alone = [int(order.rows(np.array([sample]))[0]) for sample in samples]
    assert together.tolist() == alone
    assert all(0 <= row < num_rows for row in alone)


def test_version_1_never_changes() -> None:
    """Compare with fixed numbers, on which resumed runs rely; another order is another version."""
    assert ORDER_VERSION == 1
    first = SampleOrder(1, 10).rows(np.arange(20))
    assert first.tolist() == [3, 1, 4, 7, 2, 9, 0, 8, 6, 5, 2, 8, 7, 4, 1, 6, 5, 0, 3, 9]
    samples = np.array([0, 1, 2, 1000002, 1000003, 10**12])
    rows = SampleOrder(2024, 1000003).rows(samples)
    assert rows.tolist() == [630453, 942829, 967929, 610713, 51376, 662315]
    assert SampleOrder(1, 10, corpus=3).rows(np.arange(10)).tolist() == [
        0,
        5,
        8,
        6,
        9,
        4,
        2,
        3,
        7,
        1,
    ]
    long = SampleOrder(7, 99_991).rows(np.arange(300_000)).astype("<i8")
    assert hashlib.sha256(long.tobytes()).hexdigest() == LONG_ORDER_SHA256


def test_corpus_0_is_the_order_of_a_single_corpus() -> None:
    samples = np.arange(500)
    alone = SampleOrder(5, 77).rows(samples)
    assert np.array_equal(SampleOrder(5, 77, corpus=0).rows(samples), alone)
    assert not np.array_equal(SampleOrder(5, 77, corpus=1).rows(samples), alone)


def test_seeds_and_epochs_are_shuffled_differently() -> None:
    num_rows = 10_000
    first_epoch, second_epoch = (
        SampleOrder(0, num_rows).rows(np.arange(2 * num_rows)).reshape(2, -1)
    )
    other_seed = SampleOrder(1, num_rows).rows(np.arange(num_rows))
    huge_seeds = [
        SampleOrder(seed, num_rows).rows(np.arange(num_rows)) for seed in (2**64 - 2, 2**64 - 1)
    ]
    pairs = [(first_epoch, second_epoch), (first_epoch, other_seed), (huge_seeds[0], huge_seeds[1])]
    for left, right in pairs:
        # Independent permutations agree in one place on average.
        assert np.count_nonzero(left == right) < 10
        assert abs(np.corrcoef(left, right)[0, 1]) < 0.05


@pytest.mark.parametrize("num_rows", [4, 12, 50])
def test_every_row_is_equally_likely_at_every_place(num_rows: int) -> None:
    epochs = 1000
    rows = SampleOrder(3, num_rows).rows(np.arange(epochs * num_rows)).reshape(epochs, num_rows)
    counts = np.array([np.bincount(place, minlength=num_rows) for place in rows.T])
    expected = epochs / num_rows
    chi2 = ((counts - expected) ** 2 / expected).sum()
    degrees = (num_rows - 1) ** 2
    # Five standard deviations of the chi-squared distribution.
    assert chi2 < degrees + 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize(
    ("seed", "num_rows", "corpus"),
    [(-1, 5, 0), (2**64, 5, 0), (0, 0, 0), (0, 2**62, 0), (0, 5, -1)],
)
def test_impossible_orders_are_refused(seed: int, num_rows: int, corpus: int) -> None:
    with pytest.raises(ValueError, match="must|needs"):
        SampleOrder(seed, num_rows, corpus)


def test_negative_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        SampleOrder(0, 5).rows(np.array([-1]))
