"""The data row and corpus of sample n of a run: exact quotas in blend blocks, as a pure function.

A blend block is 4096 consecutive samples, and holds a fixed number of samples of each corpus, its
quota. A keyed permutation deals the samples of a block to the corpora. The quotas of the blocks
before it give the number of draws from each corpus. Draw k of corpus c is the data row
`SampleOrder(seed, rows_c, c).rows(k)` of `order.py`. An epoch of a corpus therefore holds each of
its data rows once, whatever the other corpora are.

The corpora of a run are numbered by their first appearance in it. A change of the blend is a new
data phase: it begins with a block, continues the draws of every corpus, and does not change earlier
samples. A run of one corpus has that corpus's `SampleOrder`.

Shapes: N samples, C corpora of the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from megatron_eso.data.samples.order import SampleOrder
from megatron_eso.randomness.permutation import permute, round_keys
from megatron_eso.randomness.purposes import Purpose

BLOCK_SAMPLES = 4096

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """A dataset of the order: its id and its number of data rows."""

    dataset_id: str
    num_rows: int
    """Data rows of the run's length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlendPhase:
    """A data phase: a part of the run with one blend.

    Its tuples have an entry for each corpus that was known when it began. A corpus that is no
    longer drawn has the quota 0.
    """

    number: int
    """`data.phase`."""
    start: int
    """The first sample, a multiple of BLOCK_SAMPLES."""
    quotas: tuple[int, ...]
    """Samples of each corpus in a blend block; they add up to BLOCK_SAMPLES."""
    first_draws: tuple[int, ...]
    """Draws of each corpus before this phase."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DataRows:
    """The data rows of samples: corpus, epoch of that corpus, and data row, each int64 [N]."""

    corpus_N: Int64
    epoch_N: Int64
    row_N: Int64


@dataclass(frozen=True, kw_only=True, slots=True)
class Blend:
    """The order of a run. The first phase begins at sample 0; later phases do not begin earlier."""

    seed: int
    corpora: tuple[Corpus, ...]
    phases: tuple[BlendPhase, ...]

    @classmethod
    def begin(
        cls, seed: int, corpora: Sequence[Corpus], quotas: Sequence[int], number: int = 1
    ) -> "Blend":
        """Return the order of a run that starts with this blend."""
        phase = BlendPhase(
            number=number, start=0, quotas=tuple(quotas), first_draws=(0,) * len(corpora)
        )
        return cls(seed=seed, corpora=tuple(corpora), phases=(phase,))

    @property
    def quotas(self) -> dict[str, int]:
        """The quotas of the last phase by dataset id, without quotas of 0."""
        pairs = zip(self.corpora, self.phases[-1].quotas, strict=True)
        return {corpus.dataset_id: quota for corpus, quota in pairs if quota}

    def change(
        self, corpora: Sequence[Corpus], quotas: Sequence[int], number: int, consumed_samples: int
    ) -> "Blend":
        """Return this order up to the next block boundary, followed by another blend.

        Args:
            corpora: Corpora of the new blend, in any order; new ones get the run's next numbers.
            quotas: Quotas of these corpora.
            number: Number of the new phase.
            consumed_samples: Samples that the run has consumed so far.
        """
        # Number the corpora: those of the run first, then the new ones.
        wanted = {corpus.dataset_id: quota for corpus, quota in zip(corpora, quotas, strict=True)}
        known = {corpus.dataset_id for corpus in self.corpora}
        run_corpora = self.corpora + tuple(c for c in corpora if c.dataset_id not in known)
        # The new phase starts at the next block boundary, where the draws so far are known.
        last = self.phases[-1]
        start = max(-(-consumed_samples // BLOCK_SAMPLES) * BLOCK_SAMPLES, last.start)
        blocks = (start - last.start) // BLOCK_SAMPLES
        draws = [
            first + quota * blocks
            for first, quota in zip(last.first_draws, last.quotas, strict=True)
        ]
        phase = BlendPhase(
            number=number,
            start=start,
            quotas=tuple(wanted.get(corpus.dataset_id, 0) for corpus in run_corpora),
            first_draws=(*draws, *[0] * (len(run_corpora) - len(draws))),
        )
        return Blend(seed=self.seed, corpora=run_corpora, phases=(*self.phases, phase))

    def locate(self, sample_indices: Int64) -> DataRows:
        """Return the corpus, epoch and data row of samples.

        Args:
            sample_indices: Sample numbers, int64 [N], from 0 on, without an upper limit.

        Raises:
            ValueError: A sample number is negative.
        """
        index_N = np.asarray(sample_indices, dtype=np.int64)
        if index_N.size and index_N.min() < 0:
            raise ValueError("sample indices must not be negative")
        corpus_N, draw_N = self._draws(index_N)
        epoch_N, row_N = np.empty_like(index_N), np.empty_like(index_N)
        for number in np.unique(corpus_N).tolist():
            is_drawn_N = corpus_N == number
            num_rows = self.corpora[number].num_rows
            draws = draw_N[is_drawn_N]
            epoch_N[is_drawn_N] = draws // num_rows
            row_N[is_drawn_N] = SampleOrder(self.seed, num_rows, number).rows(draws)
        return DataRows(corpus_N=corpus_N, epoch_N=epoch_N, row_N=row_N)

    def _draws(self, index_N: Int64) -> tuple[Int64, Int64]:
        """Return the corpus of each sample, and the number of its draw from this corpus."""
        starts = [phase.start for phase in self.phases]
        phase_N = np.searchsorted(starts, index_N, side="right") - 1
        corpus_N, draw_N = np.empty_like(index_N), np.empty_like(index_N)
        for number in np.unique(phase_N).tolist():
            in_phase_N = phase_N == number
            phase = self.phases[number]
            block_N, number_N = np.divmod(index_N[in_phase_N] - phase.start, BLOCK_SAMPLES)
            # A single corpus keeps its own order.
            if max(phase.quotas) < BLOCK_SAMPLES:
                number_N = self._shuffle(block_N + phase.start // BLOCK_SAMPLES, number_N)
            quotas_C = np.array(phase.quotas, dtype=np.int64)
            stops_C = np.cumsum(quotas_C)
            found_N = np.searchsorted(stops_C, number_N, side="right")
            rank_N = number_N - (stops_C - quotas_C)[found_N]
            first_C = np.array(phase.first_draws, dtype=np.int64)
            corpus_N[in_phase_N] = found_N
            draw_N[in_phase_N] = first_C[found_N] + block_N * quotas_C[found_N] + rank_N
        return corpus_N, draw_N

    def _shuffle(self, block_N: Int64, number_N: Int64) -> Int64:
        """Permute numbers within their blend blocks, by the permutation of each block."""
        shuffled_N = np.empty_like(number_N)
        for block in np.unique(block_N).tolist():
            in_block_N = block_N == block
            keys = round_keys(self.seed, Purpose.BLEND, block)
            shuffled_N[in_block_N] = permute(
                number_N[in_block_N].astype(np.uint64), BLOCK_SAMPLES, keys
            )
        return shuffled_N


def resolve_quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the samples of each corpus in a blend block, by the largest remainder method.

    Args:
        weights: Positive weights in any unit. A float counts as its shortest decimal.

    Returns:
        Whole numbers that add up to BLOCK_SAMPLES; a share below 1 / BLOCK_SAMPLES may become 0.
    """
    shares = [Fraction(repr(weight)) for weight in weights]
    exact = [share * BLOCK_SAMPLES / sum(shares) for share in shares]
    quotas = [int(quota) for quota in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: quotas[number] - exact[number])
    for number in by_remainder[: BLOCK_SAMPLES - sum(quotas)]:
        quotas[number] += 1
    return tuple(quotas)
