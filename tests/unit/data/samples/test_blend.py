"""Blends: exact shares in every block, each data row once per epoch, no change of past samples."""

import dataclasses
import hashlib
import json
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eso.data.samples.blend import (
    BLOCK_SAMPLES,
    Blend,
    BlendPhase,
    Corpus,
    DataRows,
    resolve_quotas,
)
from megatron_eso.data.samples.order import ORDER_VERSION, SampleOrder

BLENDED_ORDER_SHA256 = "38fac21f00c726ba7597b34fad1ed6705ca87de85c9239380f2b4e1dbef509d7"
SEEDS = st.integers(0, 2**64 - 1)
# Epochs of the smaller corpora end within a block; those of the larger ones are longer.
ROWS = st.integers(150, 6000)
WEIGHTS = st.lists(st.integers(1, 1000), min_size=1, max_size=5)
NUM_BLOCKS = 3


@st.composite
def corpora_with_quotas(draw: st.DrawFn, names: str = "abcde") -> tuple[list[Corpus], list[int]]:
    """Draw some corpora in any order; equal names have equal numbers of data rows."""
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True))
    corpora = [Corpus(dataset_id=name, num_rows=150 * 5 ** "abcde".index(name)) for name in chosen]
    weights = draw(st.lists(st.integers(1, 50), min_size=len(chosen), max_size=len(chosen)))
    return corpora, list(resolve_quotas(weights))


def restart(blend: Blend) -> Blend:
    """Return the blend after a checkpoint is written and read."""
    state = json.loads(json.dumps(dataclasses.asdict(blend)))
    phases = tuple(
        BlendPhase(
            number=phase["number"],
            start=phase["start"],
            quotas=tuple(phase["quotas"]),
            first_draws=tuple(phase["first_draws"]),
        )
        for phase in state["phases"]
    )
    corpora = tuple(Corpus(**corpus) for corpus in state["corpora"])
    return Blend(seed=state["seed"], corpora=corpora, phases=phases)


def stack(places: DataRows) -> npt.NDArray[np.int64]:
    """Return corpus, epoch and data row of each sample, int64 [N, 3]."""
    return np.stack([places.corpus_N, places.epoch_N, places.row_N], axis=1)


def check_epochs(blend: Blend, places: DataRows) -> None:
    """Check that blocks from the first sample on hold each epoch of a corpus once, in order."""
    for number, corpus in enumerate(blend.corpora):
        is_drawn = places.corpus_N == number
        epochs, rows = places.epoch_N[is_drawn], places.row_N[is_drawn]
        order = np.lexsort((rows, epochs))
        epochs, rows = epochs[order], rows[order]
        assert np.array_equal(epochs, np.arange(len(rows)) // corpus.num_rows)
        num_whole = len(rows) // corpus.num_rows * corpus.num_rows
        assert np.array_equal(rows[:num_whole], np.arange(num_whole) % corpus.num_rows)
        assert len(np.unique(rows[num_whole:])) == len(rows) - num_whole


@given(weights=WEIGHTS)
def test_quotas_are_the_shares_to_within_one_and_add_up(weights: list[int]) -> None:
    quotas = resolve_quotas(weights)
    assert sum(quotas) == BLOCK_SAMPLES
    errors = [
        quota - Fraction(weight, sum(weights)) * BLOCK_SAMPLES
        for quota, weight in zip(quotas, weights, strict=True)
    ]
    assert all(abs(error) < 1 for error in errors)
    # Hamilton's rule: no quota that is rounded up has a smaller remainder than one rounded down.
    up = [1 - error for error in errors if error > 0]
    down = [-error for error in errors if error < 0]
    assert not up or not down or min(up) >= max(down)
    assert resolve_quotas([weight / 8 for weight in weights]) == quotas


def test_decimal_weights_count_as_they_are_written() -> None:
    assert resolve_quotas([0.6, 0.1, 0.3]) == (2458, 409, 1229)
    assert resolve_quotas([0.1] * 3) == resolve_quotas([1, 1, 1])
    assert resolve_quotas([1, 10_000_000]) == (0, BLOCK_SAMPLES)
    assert resolve_quotas([0.0, 1.0]) == (0, BLOCK_SAMPLES)


@settings(max_examples=40)
@given(seed=SEEDS, weights=WEIGHTS, rows=st.lists(ROWS, min_size=5, max_size=5))
def test_every_block_holds_the_quotas_and_every_epoch_each_row_once(
    seed: int, weights: list[int], rows: list[int]
) -> None:
    quotas = resolve_quotas(weights)
    corpora = [Corpus(dataset_id=str(n), num_rows=rows[n]) for n in range(len(weights))]
    blend = Blend.begin(seed, corpora, quotas)
    places = blend.locate(np.arange(NUM_BLOCKS * BLOCK_SAMPLES))
    for block in places.corpus_N.reshape(NUM_BLOCKS, BLOCK_SAMPLES):
        assert np.bincount(block, minlength=len(quotas)).tolist() == list(quotas)
    check_epochs(blend, places)
    # A block continues the draws of the blocks before it, in any order within the block.
    for number, corpus in enumerate(corpora):
        draws = quotas[number] + np.arange(quotas[number])
        found = places.row_N[BLOCK_SAMPLES : 2 * BLOCK_SAMPLES]
        found = found[places.corpus_N[BLOCK_SAMPLES : 2 * BLOCK_SAMPLES] == number]
        expected = SampleOrder(seed, corpus.num_rows, number).rows(draws)
        assert np.array_equal(np.sort(found), np.sort(expected))


@given(
    seed=SEEDS,
    num_rows=st.integers(1, 2**40),
    samples=st.lists(st.integers(0, 2**50), max_size=20),
)
def test_a_blend_of_one_is_the_order_of_its_corpus(
    seed: int, num_rows: int, samples: list[int]
) -> None:
    blend = Blend.begin(seed, [Corpus(dataset_id="a", num_rows=num_rows)], [BLOCK_SAMPLES])
    indices = np.array(samples, dtype=np.int64)
    places = blend.locate(indices)
    assert np.array_equal(places.row_N, SampleOrder(seed, num_rows).rows(indices))
    assert np.array_equal(places.epoch_N, indices // num_rows)
    assert not places.corpus_N.any()


@settings(max_examples=30)
@given(
    seed=SEEDS,
    first=corpora_with_quotas(),
    changes=st.lists(st.tuples(st.integers(0, 9000), corpora_with_quotas()), max_size=3),
)
def test_phases_repeat_nothing_and_leave_the_past_alone(
    seed: int,
    first: tuple[list[Corpus], list[int]],
    changes: list[tuple[int, tuple[list[Corpus], list[int]]]],
) -> None:
    """Change the blend several times, each time some samples later and after a resume."""
    blend, consumed = Blend.begin(seed, *first), 0
    for number, (advance, (corpora, quotas)) in enumerate(changes, start=2):
        consumed += advance
        changed = restart(blend).change(corpora, quotas, number, consumed)
        start = changed.phases[-1].start
        assert start % BLOCK_SAMPLES == 0
        assert consumed <= start or start == blend.phases[-1].start
        assert start < max(consumed, blend.phases[-1].start) + BLOCK_SAMPLES
        past = np.arange(start)
        assert np.array_equal(stack(changed.locate(past)), stack(blend.locate(past)))
        block = changed.locate(start + np.arange(BLOCK_SAMPLES)).corpus_N
        drawn = {
            changed.corpora[corpus].dataset_id: count
            for corpus, count in enumerate(np.bincount(block).tolist())
            if count
        }
        wanted = zip(corpora, quotas, strict=True)
        assert drawn == {corpus.dataset_id: quota for corpus, quota in wanted if quota}
        assert changed.corpora[: len(blend.corpora)] == blend.corpora
        blend = changed
    num_blocks = blend.phases[-1].start // BLOCK_SAMPLES + 2
    check_epochs(blend, blend.locate(np.arange(num_blocks * BLOCK_SAMPLES)))


def test_an_unchanged_blend_as_a_new_phase_changes_nothing() -> None:
    corpora = [Corpus(dataset_id=name, num_rows=rows) for name, rows in (("a", 700), ("b", 90))]
    blend = Blend.begin(5, corpora, (3000, 1096))
    again = blend.change(corpora[::-1], (1096, 3000), 2, 5000)
    samples = np.arange(5 * BLOCK_SAMPLES)
    assert np.array_equal(stack(again.locate(samples)), stack(blend.locate(samples)))


@settings(max_examples=20)
@given(
    seed=SEEDS,
    blended=corpora_with_quotas("abc"),
    stages=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(1, 200), st.integers(1, 6)),
        min_size=1,
        max_size=5,
    ),
)
def test_ranks_batches_and_resumes_see_the_samples_of_one_long_run(
    seed: int, blended: tuple[list[Corpus], list[int]], stages: list[tuple[int, int, int]]
) -> None:
    """Run parts of (data-parallel size, samples per rank and step, steps), each after a resume."""
    blend = Blend.begin(seed, *blended)
    consumed, seen = 0, []
    for data_parallel_size, samples_per_rank, steps in stages:
        resumed = restart(blend)
        for _ in range(steps):
            places = consumed + np.arange(data_parallel_size * samples_per_rank)
            by_rank = [places[rank::data_parallel_size] for rank in range(data_parallel_size)]
            seen += [np.column_stack([n, stack(resumed.locate(n))]) for n in by_rank]
            consumed += len(places)
    found = np.concatenate(seen)
    found = found[np.argsort(found[:, 0])]
    assert np.array_equal(found[:, 0], np.arange(consumed))
    assert np.array_equal(found[:, 1:], stack(blend.locate(np.arange(consumed))))
    # No data row comes twice in an epoch, for any number of samples.
    assert len(np.unique(found[:, 1:], axis=0)) == consumed


def test_corpora_are_mixed_within_a_block() -> None:
    """Compare the lengths of runs of one corpus with those of a fair shuffle."""
    corpora = [Corpus(dataset_id=name, num_rows=10**6) for name in "ab"]
    blend = Blend.begin(3, corpora, (1024, 3072))
    corpus = blend.locate(np.arange(100 * BLOCK_SAMPLES)).corpus_N
    changes = np.count_nonzero(np.diff(corpus)) / len(corpus)
    expected = 2 * 0.25 * 0.75
    # Five standard deviations of a mean of independent places.
    assert abs(changes - expected) < 5 * np.sqrt(expected * (1 - expected) / len(corpus))
    shares = [np.mean(part == 0) for part in np.split(corpus[: 4096 * 100], 16 * 100)]
    assert np.std(shares) == pytest.approx(np.sqrt(0.25 * 0.75 / 256 * 15 / 16), rel=0.1)


def test_version_1_of_a_blend_never_changes() -> None:
    assert ORDER_VERSION == 1
    corpora = [Corpus(dataset_id=name, num_rows=rows) for name, rows in (("a", 1003), ("b", 10**9))]
    blend = Blend.begin(2024, corpora, (1000, 3096))
    samples = np.concatenate([np.arange(5000), 10**12 + np.arange(5000)])
    digest = hashlib.sha256(stack(blend.locate(samples)).astype("<i8").tobytes())
    assert digest.hexdigest() == BLENDED_ORDER_SHA256


def test_negative_samples_are_refused() -> None:
    blend = Blend.begin(1, [Corpus(dataset_id="a", num_rows=5)], (BLOCK_SAMPLES,))
    with pytest.raises(ValueError, match="negative"):
        blend.locate(np.array([-1]))
    assert blend.locate(np.array([], dtype=np.int64)).row_N.shape == (0,)
