"""BD3-LM: blocks from left to right, diffusion within a block (arXiv 2503.09573).

Each block has a time t of its own, at which its tokens are masked with probability t and weighted
with 1 / t. With a clip the times lie in a smaller interval, and the masks of a block are drawn
again until their share lies in it. Source: `diffusion.py` of the repository (`_sample_t`, `q_xt`,
`_resample_q_xt`).

Shapes: B samples of a micro-batch, T positions, K blocks of a whole sample, M = 0 .. block size.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_eso.batches.packing import Part, Stream, pack_parts
from megatron_eso.batches.parts import plan_blocks
from megatron_eso.batches.rows import MicroBatch
from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.config.sections import Vocabulary
from megatron_eso.objectives.noise.blocks import BlockNoise, Clip, draw_blocks, measure_masks
from megatron_eso.objectives.objective import (
    VALIDATION_SEED,
    OnePhase,
    Samples,
    Step,
    refuse_orders,
)
from megatron_eso.objectives.row_counts import RowCounts, expect_block_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Bd3LmObjective(OnePhase):
    """The block diffusion objective.

    Attributes:
        seed: The run's seed.
        mask_token_id: Token of masked positions.
        block_size: Tokens of a block.
        clip: The interval of times and of masked shares in training.
        whole: The interval of times in validation.
    """

    phase_name = "diffusion"

    seed: int
    mask_token_id: int
    block_size: int
    clip: Clip
    whole: Clip

    @classmethod
    def from_config(cls, config: ObjectiveConfig, vocabulary: Vocabulary, *, seed: int) -> Self:
        """Build the objective from its section."""
        whole = Clip(low=config.sampling_eps, high=1.0, redraws=False)
        clip = whole
        if config.clip is not None:
            low, high = config.clip
            clip = Clip(low=max(low, config.sampling_eps), high=high, redraws=True)
        return cls(
            seed=seed,
            mask_token_id=vocabulary.mask_token_id,
            block_size=config.block_size,
            clip=clip,
            # A single token has an exact likelihood: it is masked, with weight 1.
            whole=Clip(low=1.0, high=1.0, redraws=False) if config.block_size == 1 else whole,
        )

    def plan(self, samples: Samples, step: Step) -> MicroBatch:
        """Plan a micro-batch; times are stratified over all blocks of the step."""
        noise = draw_blocks(
            self.seed,
            samples.indices_B,
            samples.indices_B - step.first_index,
            num_samples=step.batch_size,
            stratum_index=step.first_index,
            starts_BT=self._find_starts(samples),
            block_size=self.block_size,
            clip=self.clip,
        )
        return self.plan_noise(samples, noise)

    def plan_validation(self, samples: Samples, num_samples: int) -> MicroBatch:
        """Plan samples once each; times are stratified over all blocks of N samples."""
        noise = draw_blocks(
            VALIDATION_SEED,
            samples.indices_B,
            samples.indices_B,
            num_samples=num_samples,
            stratum_index=0,
            starts_BT=self._find_starts(samples),
            block_size=self.block_size,
            clip=self.whole,
            is_validation=True,
        )
        return self.plan_noise(samples, noise)

    def plan_order(self, samples: Samples, number: int) -> MicroBatch:
        """Refuse: the objective bounds a likelihood only."""
        refuse_orders("bd3_lm")

    def plan_largest(self, phase_B: NDArray[np.int64], sequence_length: int) -> MicroBatch:
        """Plan whole samples with every token masked."""
        samples = Samples.blank(len(phase_B), sequence_length, self.mask_token_id)
        shape = samples.tokens_BT.shape
        noise = BlockNoise(is_masked_BT=np.ones(shape, dtype=np.bool_), t_BT=np.ones(shape))
        return self.plan_noise(samples, noise)

    def expect_rows(self, num_tokens: int) -> tuple[RowCounts]:
        """Return the mean rows of a sample."""
        unmasked, share = measure_masks(self.block_size, self.clip)
        return (expect_block_rows(num_tokens, self.block_size, unmasked, share),)

    def plan_noise(self, samples: Samples, noise: BlockNoise) -> MicroBatch:
        """Plan rows for given times and masks."""
        natural_BT = np.tile(np.arange(samples.tokens_BT.shape[1]), (len(samples.length_B), 1))
        clean: list[Part] = []
        noisy: list[Part] = []
        for stream in samples.split(natural_BT, noise.is_masked_BT):
            parts = self._plan_stream(stream, noise.t_BT[stream.sample, stream.positions_N])
            clean.append(parts[0])
            noisy.append(parts[1])
        return pack_parts(
            [*clean, *noisy],
            indices_B=samples.indices_B,
            phase_B=np.zeros(len(samples.length_B), dtype=np.int64),
            mask_token_id=self.mask_token_id,
        )

    def _plan_stream(self, stream: Stream, t_N: NDArray[np.float64]) -> tuple[Part, Part]:
        """Plan a stream whose tokens have the times `t_N`."""
        elbo_weight_N = 1.0 / t_N
        # The reference gives a high clip no weights.
        weight_N = np.ones_like(t_N) if self.clip.low > 0.5 else elbo_weight_N
        return plan_blocks(
            stream,
            np.arange(stream.length) // self.block_size,
            self.mask_token_id,
            weight_N=weight_N,
            elbo_weight_N=elbo_weight_N,
        )

    def _find_starts(self, samples: Samples) -> NDArray[np.int64]:
        """Return `[B, T]`: the position at which each token's block starts."""
        natural_T = np.arange(samples.tokens_BT.shape[1])
        first_BT = np.zeros_like(samples.tokens_BT)
        if samples.documents_BT is not None:
            is_first_BT = np.diff(samples.documents_BT, axis=1, prepend=-1) != 0
            first_BT = np.maximum.accumulate(np.where(is_first_BT, natural_T, 0), axis=1)
        starts_BT: NDArray[np.int64] = (
            first_BT + (natural_T - first_BT) // self.block_size * self.block_size
        )
        return starts_BT
