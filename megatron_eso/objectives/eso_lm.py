"""Eso-LM: a diffusion phase and a sequential phase (arXiv 2506.01928, section 3).

The diffusion phase reveals the share alpha_0 of the tokens, and the sequential phase reveals the
others one by one. A training sample is in one of the phases, a validation sample in both. Variant B
is causal over slots; in variant A clean tokens read each other both ways.

Shapes: B samples of a micro-batch, T positions, N samples of a validation set.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_eso.batches.dealing import PhaseSplit
from megatron_eso.batches.packing import Part, Stream, pack_parts
from megatron_eso.batches.parts import (
    plan_clean,
    plan_mixed,
    plan_next_tokens,
    plan_queries,
    read_causally,
    read_prefix_fully,
)
from megatron_eso.batches.rows import MicroBatch, Span
from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.config.sections import Vocabulary
from megatron_eso.objectives.noise.orders import OrderLaw
from megatron_eso.objectives.noise.schedule import LogLinearSchedule
from megatron_eso.objectives.noise.slots import (
    Noise,
    diffusion_times,
    draw_any_order,
    draw_noise,
    validation_times,
)
from megatron_eso.objectives.objective import VALIDATION_SEED, Phase, Samples, Step
from megatron_eso.objectives.row_counts import (
    RowCounts,
    expect_diffusion_rows,
    expect_next_token_rows,
    expect_sequential_rows,
)

DIFFUSION, SEQUENTIAL = 0, 1


@dataclass(frozen=True, kw_only=True, slots=True)
class EsoLmObjective:
    """The hybrid objective of Eso-LM.

    Attributes:
        seed: The run's seed.
        mask_token_id: Token of masked slots.
        schedule: The noise schedule, with alpha_0.
        batch_split: Share of the samples in the diffusion phase.
        is_weighted: Whether the diffusion phase has the weights of the NELBO ("elbo"); otherwise
            every weight is 1 ("low_var").
        sampling_eps: Lowest time.
        order: Order of the masked tokens in the sequential phase.
        reads_both_ways: Whether clean tokens read each other both ways: variant A.
        predicts_next: Whether rows of the sequential phase predict the next token where they can.
        warmup_steps: Steps over which alpha_0 rises from 0.
    """

    seed: int
    mask_token_id: int
    schedule: LogLinearSchedule
    batch_split: float
    is_weighted: bool
    sampling_eps: float
    order: OrderLaw
    reads_both_ways: bool
    predicts_next: bool
    warmup_steps: int

    @classmethod
    def from_config(cls, config: ObjectiveConfig, vocabulary: Vocabulary, *, seed: int) -> Self:
        """Build the objective from its section."""
        return cls(
            seed=seed,
            mask_token_id=vocabulary.mask_token_id,
            schedule=LogLinearSchedule(config.alpha_0),
            batch_split=config.batch_split,
            is_weighted=config.loss_type == "elbo",
            sampling_eps=config.sampling_eps,
            order=OrderLaw.from_config(config),
            reads_both_ways=config.variant == "a",
            predicts_next=config.sequential_prediction == "next",
            warmup_steps=config.alpha_0_warmup_steps,
        )

    @property
    def phases(self) -> tuple[Phase, Phase]:
        """The diffusion phase, then the sequential one; at alpha_0 = 0 or 1 one share is 0."""
        return (
            Phase(name="diffusion", share=self.batch_split),
            Phase(name="sequential", share=1 - self.batch_split),
        )

    def assign_phases(self, step: Step) -> NDArray[np.int64]:
        """Return the phase of each place, spread evenly over the step."""
        split = PhaseSplit(step.batch_size, self.batch_split)
        return split.phases(np.arange(step.batch_size))

    def find_schedule(self, step: Step) -> LogLinearSchedule:
        """Return the noise schedule of a training step."""
        if step.number >= self.warmup_steps:
            return self.schedule
        return LogLinearSchedule(self.schedule.alpha_0 * step.number / self.warmup_steps)

    def plan(self, samples: Samples, step: Step) -> MicroBatch:
        """Plan a micro-batch, each sample in the phase of its place."""
        schedule = self.find_schedule(step)
        # The place of a sample in its step decides its phase and its stratum of times.
        split = PhaseSplit(step.batch_size, self.batch_split)
        places_B = samples.indices_B - step.first_index
        noise = draw_noise(
            self.seed,
            samples.indices_B,
            split.phases(places_B) == SEQUENTIAL,
            diffusion_times(
                self.seed, step.first_index, split, places_B, sampling_eps=self.sampling_eps
            ),
            schedule,
            samples.tokens_BT.shape[1],
            length_B=samples.length_B,
            order=self.order,
        )
        return replace(self, schedule=schedule).plan_noise(samples, noise)

    def count_targets(self, length_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the lengths: the loss is a mean over all tokens, masked or not."""
        return length_B

    def plan_validation(self, samples: Samples, num_samples: int) -> MicroBatch:
        """Plan samples in every phase with tokens to predict; stratify times over N samples."""
        # At alpha_0 = 0 or 1 one phase has no tokens to predict.
        empty = {0.0: DIFFUSION, 1.0: SEQUENTIAL}.get(self.schedule.alpha_0)
        phases = [phase for phase in (DIFFUSION, SEQUENTIAL) if phase != empty]
        size = len(samples.indices_B)
        times_B = validation_times(
            VALIDATION_SEED, samples.indices_B, num_samples, sampling_eps=self.sampling_eps
        )
        # Each sample comes once for every phase.
        tiled = samples.repeat(len(phases))
        noise = draw_noise(
            VALIDATION_SEED,
            tiled.indices_B,
            np.repeat(phases, size) == SEQUENTIAL,
            np.tile(times_B, len(phases)),
            self.schedule,
            tiled.tokens_BT.shape[1],
            length_B=tiled.length_B,
            is_validation=True,
            order=self.order,
        )
        return self.plan_noise(tiled, noise, for_nelbo=True)

    def plan_order(self, samples: Samples, number: int) -> MicroBatch:
        """Plan orders of the sequential phase: alpha_0 T tokens at random, then the others."""
        noise = draw_any_order(
            VALIDATION_SEED,
            samples.indices_B,
            number,
            self.schedule.alpha_0,
            samples.tokens_BT.shape[1],
            order=self.order,
        )
        return self.plan_noise(samples, noise, for_nelbo=True)

    def plan_orders(self, samples: Samples, permutation_BT: NDArray[np.int64]) -> MicroBatch:
        """Plan samples of the sequential phase with every token masked, in given orders.

        Args:
            samples: The samples.
            permutation_BT: `permutation[b, slot] = position`.
        """
        noise = Noise(
            length_B=samples.length_B,
            is_masked_BT=np.ones_like(permutation_BT, dtype=np.bool_),
            permutation_BT=permutation_BT,
            t_B=np.full(len(permutation_BT), np.nan),
            is_sequential_B=np.ones(len(permutation_BT), dtype=np.bool_),
        )
        return self.plan_noise(samples, noise, for_nelbo=True)

    def plan_largest(self, phase_B: NDArray[np.int64], sequence_length: int) -> MicroBatch:
        """Plan T rows per diffusion sample, T - 1 clean rows and T queries per sequential one.

        With next-token rows, a sequential sample has half as many queries. It has that many where
        every second token is masked, and as many losses where all are, but never both.
        """
        shape = (len(phase_B), sequence_length)
        permutation_T = np.arange(sequence_length)
        if self.predicts_next:
            # Pairs of tokens, the last pair first: a query predicts the first token of each.
            permutation_T = np.argsort(-(permutation_T // 2), kind="stable")
        noise = Noise(
            length_B=np.full(shape[0], sequence_length),
            is_masked_BT=np.ones(shape, dtype=np.bool_),
            permutation_BT=np.tile(permutation_T, (shape[0], 1)),
            t_B=np.where(phase_B == SEQUENTIAL, np.nan, 1.0),
            is_sequential_B=phase_B == SEQUENTIAL,
        )
        return self.plan_noise(Samples.blank(*shape, self.mask_token_id), noise)

    def validation_times(self, num_samples: int) -> Mapping[str, NDArray[np.float64]]:
        """Return the times of the diffusion phase; empty at alpha_0 = 0."""
        if self.schedule.alpha_0 == 0:
            return {}
        indices_N = np.arange(num_samples)
        times_N = validation_times(
            VALIDATION_SEED, indices_N, num_samples, sampling_eps=self.sampling_eps
        )
        return {"diffusion": times_N}

    def expect_rows(self, num_tokens: int) -> tuple[RowCounts, RowCounts]:
        """Return the expected rows of a sample, for each phase."""
        alpha_0, both_ways = self.schedule.alpha_0, self.reads_both_ways
        diffusion = expect_diffusion_rows(
            num_tokens, alpha_0, self.sampling_eps, reads_both_ways=both_ways
        )
        if self.predicts_next:
            return diffusion, expect_next_token_rows(num_tokens, alpha_0)
        return diffusion, expect_sequential_rows(num_tokens, alpha_0, reads_both_ways=both_ways)

    def combine(self, losses_P: Tensor) -> Tensor:
        """Return the sum of both phases."""
        return losses_P.sum()

    def plan_noise(self, samples: Samples, noise: Noise, *, for_nelbo: bool = False) -> MicroBatch:
        """Plan rows with the weights of the objective, or of the NELBO."""
        # The weights of the samples.
        elbo_weight_B = np.ones(len(noise.length_B))
        is_diffusion_B = ~noise.is_sequential_B
        elbo_weight_B[is_diffusion_B] = self.schedule.elbo_weight(noise.t_B[is_diffusion_B])
        is_weighted = self.is_weighted or for_nelbo
        weight_B = elbo_weight_B if is_weighted else np.ones_like(elbo_weight_B)
        # The parts in the order of the rows: mixed streams, clean streams, queries.
        mixed: list[Part] = []
        clean: list[Part] = []
        queries: list[Part] = []
        for stream in samples.split(noise.permutation_BT, noise.is_masked_BT):
            if noise.is_sequential_B[stream.sample]:
                planned = self._plan_sequential(stream)
                clean.append(planned[0])
                queries.append(planned[1])
            else:
                mixed.append(
                    plan_mixed(
                        stream,
                        self._read_stream(stream, stream.length),
                        self.mask_token_id,
                        weight=weight_B[stream.sample],
                        elbo_weight=elbo_weight_B[stream.sample],
                    )
                )
        return pack_parts(
            [*mixed, *clean, *queries],
            indices_B=samples.indices_B,
            phase_B=noise.is_sequential_B.astype(np.int64),
            mask_token_id=self.mask_token_id,
        )

    def _plan_sequential(self, stream: Stream) -> tuple[Part, Part]:
        """Plan the clean stream and the queries of the sequential phase."""
        if self.predicts_next:
            return plan_next_tokens(stream, self.mask_token_id)
        clean = plan_clean(stream, self._read_stream(stream, stream.length - 1))
        return clean, plan_queries(stream, clean, self.mask_token_id)

    def _read_stream(self, stream: Stream, num_rows: int) -> tuple[Span, ...]:
        """Return what the first rows of a stream read, by the variant."""
        if self.reads_both_ways:
            return read_prefix_fully(stream.length - stream.num_masked, num_rows)
        return read_causally(num_rows)
