"""How long a step takes, from sizes alone: a rough form of the simulator, for many layouts at once.

The bytes that kernels move are those that the simulator counts for this network under torch's own
attention, per row and channel, per pair of a query and a key, and per logit.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_eso.batches.rows import STREAMS, Reading, Span
from megatron_eso.config.sections import Config
from megatron_eso.estimates.activations import COMPUTE_BYTES, FLOAT32_BYTES
from megatron_eso.estimates.flops import BACKWARD_AND_FORWARD, forward_flops
from megatron_eso.estimates.gpus import EFFICIENCY, GPUS_PER_NODE, Gpu
from megatron_eso.estimates.parameters import count_rank_parameters
from megatron_eso.objectives.objective import Objective, Samples, Step
from megatron_eso.objectives.row_counts import RowCounts

ELEMENTWISE_BYTES = 230
"""Moved for a row and channel of a layer, forward and backward, by all but matrix products."""
HEAD_BYTES = 300
"""Moved in addition for a row and channel of the query heads."""
TILE_QUERIES = 256
"""Queries of a tile of torch's own attention, outside streams."""
SCORE_BYTES = 143
"""Moved for a score of a tile and a head, forward and backward."""
SCORE_PRODUCTS = 7
"""Matrix products over the scores of a tile, in float32, forward and backward."""
SHARED_TILE = 1.2
"""A score of a tile with several blocks over another score: rows are copied, and more is hidden."""
TILE_KERNELS = 6
"""Kernels of a tile that are too small for more than their shortest time."""
LOGIT_BYTES = 90
"""Moved for a logit, forward and backward."""
LAYER_KERNELS = 150
"""Kernels of a layer, forward and backward."""
GRADIENT_BYTES = 10
"""Moved for a parameter to add its gradient of a micro-batch."""
UPDATE_BYTES = 90
"""Moved for a parameter that this rank updates."""
RECOMPUTED = 4 / 3
"""A step with recomputation over one without: three forward passes' worth become four."""
NUM_PLANNED = 32
"""Samples whose planned rows stand for those of a run."""
OVERLAPPED = 0.8
"""Share of a micro-batch's kernels that the exchange of gradients and weights can hide behind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Estimated seconds of a step on the slowest rank.

    Attributes:
        kernels: Forward and backward.
        update: The optimizer.
        communication: Time that kernels wait for other ranks.
        bubble: Time that a stage waits at the beginning and the end of a pipeline.
    """

    kernels: float
    update: float
    communication: float
    bubble: float

    @property
    def total(self) -> float:
        """The step."""
        return self.kernels + self.update + self.communication + self.bubble


def estimate_step(config: Config, objective: Objective, world_size: int, gpu: Gpu) -> StepTime:
    """Estimate a step.

    Args:
        config: A configuration that `check_layout` accepts, with its vocabulary.
        objective: Its objective.
        world_size: Number of ranks.
        gpu: The GPU of every rank.
    """
    parallel, train = config.parallel, config.train
    stages = parallel.pipeline_model_parallel_size
    ranks = world_size // parallel.model_parallel_size
    number = train.global_batch_size // train.micro_batch_size // ranks
    parameters = max(
        count_rank_parameters(config.model, parallel, config.data.vocab_size or 0, stage)
        for stage in range(stages)
    )
    # A micro-batch on one stage, then everything of a step.
    kernels = _estimate_micro_batch(config, objective, gpu)
    kernels += GRADIENT_BYTES * parameters / _bandwidth(gpu)
    exchange = _estimate_exchange(config, objective, gpu)
    shards = ranks if parallel.use_distributed_optimizer else 1
    moved = UPDATE_BYTES * parameters / shards + 2 * FLOAT32_BYTES * parameters
    reduction = _estimate_reduction(config, ranks, parameters, kernels, gpu)
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    return StepTime(
        kernels=number * kernels,
        update=moved / _bandwidth(gpu),
        communication=number * exchange + reduction,
        bubble=(stages - 1) / chunks * (kernels + exchange),
    )


def _bandwidth(gpu: Gpu) -> float:
    return gpu.bandwidth * EFFICIENCY.bandwidth


def _expect_micro_batch(config: Config, objective: Objective) -> RowCounts:
    """Return the mean rows of a micro-batch."""
    num_tokens, size = config.data.sequence_length, config.train.micro_batch_size
    counts = RowCounts()
    for phase, rows in zip(objective.phases, objective.expect_rows(num_tokens), strict=True):
        counts += rows * (phase.share * size)
    return counts


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiled:
    """The attention of a layer outside streams, which torch's own attention does in tiles.

    Attributes:
        pairs: Query-key pairs.
        scores: Scores that are computed for them, hidden ones among them.
        tiles: Tiles.
    """

    pairs: float = 0.0
    scores: float = 0.0
    tiles: float = 0.0

    def __add__(self, other: "Tiled") -> "Tiled":
        return Tiled(
            pairs=self.pairs + other.pairs,
            scores=self.scores + other.scores,
            tiles=self.tiles + other.tiles,
        )

    def __mul__(self, factor: float) -> "Tiled":
        return Tiled(
            pairs=self.pairs * factor, scores=self.scores * factor, tiles=self.tiles * factor
        )


@lru_cache(maxsize=8)
def count_tiled(objective: Objective, num_tokens: int, mask_token_id: int) -> tuple[Tiled, Tiled]:
    """Return the mean attention of a sample outside streams: in a body layer, in the last layer.

    It is that of the planned rows of one step after every warm-up.

    Args:
        objective: The objective.
        num_tokens: Tokens of a sample.
        mask_token_id: The mask token.
    """
    step = Step.late(NUM_PLANNED)
    rows = objective.plan(Samples.blank(NUM_PLANNED, num_tokens, mask_token_id), step).rows
    body, last = (
        sum((_count_span(span) for span in spans if span.reading not in STREAMS), Tiled())
        for spans in (rows.spans, rows.loss_spans)
    )
    return body * (1 / NUM_PLANNED), last * (1 / NUM_PLANNED)


def _count_span(span: Span) -> Tiled:
    """Count the tiles of a span; small spans share tiles with their neighbours."""
    size, tiles = span.num_rows, span.num_rows / TILE_QUERIES
    if span.reading is not Reading.BLOCK:
        pairs = size * (span.num_keys - size / 2)
        # A row is scored with the keys of its whole tile, half a tile more in the mean.
        return Tiled(pairs=pairs, scores=pairs + size * TILE_QUERIES / 2, tiles=tiles)
    pairs = size * (span.num_keys + span.num_own)
    hidden = 1.5 * (TILE_QUERIES - min(size, TILE_QUERIES))  # keys, and rows of other blocks
    cost = SHARED_TILE if size < TILE_QUERIES else 1.0
    return Tiled(pairs=pairs, scores=cost * (pairs + size * hidden), tiles=tiles)


def _estimate_micro_batch(config: Config, objective: Objective, gpu: Gpu) -> float:
    """Return the seconds of the kernels of a micro-batch on one stage."""
    model, parallel = config.model, config.parallel
    ranks, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    counts, num_body = _expect_micro_batch(config, objective), model.num_layers - 1
    data = config.data
    body, last = count_tiled(
        objective,  # type: ignore[arg-type] # it is a frozen dataclass
        data.sequence_length,
        data.mask_token_id or 0,
    )
    tiled = (body * num_body + last) * config.train.micro_batch_size
    vocab_size = config.data.vocab_size or 0
    # Matrix products at their speed, attention within streams at its own.
    pairs = max(num_body * counts.pairs + counts.loss_pairs - tiled.pairs, 0.0)
    flash = BACKWARD_AND_FORWARD * 4.0 * model.query_size * pairs
    without_pairs = replace(counts, pairs=0.0, loss_pairs=0.0)
    products = BACKWARD_AND_FORWARD * forward_flops(model, vocab_size, without_pairs)
    peak = gpu.bf16_flops if COMPUTE_BYTES[config.train.precision] == 2 else gpu.fp32_flops
    seconds = products / peak / EFFICIENCY.gemm + flash / peak / EFFICIENCY.flash
    # Everything else at the memory's speed, or at the pace of its kernels.
    split = ranks if parallel.sequence_parallel else (1 + ranks) / 2
    channels = ELEMENTWISE_BYTES * model.hidden_size + HEAD_BYTES * model.query_size
    moved = channels * counts.rows * model.num_layers / split
    moved += LOGIT_BYTES * model.pad_vocabulary(vocab_size) * counts.loss_rows / ranks
    launches = LAYER_KERNELS * model.num_layers * EFFICIENCY.kernel_seconds
    seconds = seconds / ranks + max(moved / _bandwidth(gpu), launches)
    # Tiles in float32: what they move, what they compute, and kernels that are too small.
    score = SCORE_BYTES / _bandwidth(gpu)
    score += SCORE_PRODUCTS * 2 * model.kv_channels / (gpu.fp32_flops * EFFICIENCY.fp32)
    seconds += score * tiled.scores * model.num_attention_heads / ranks
    seconds += tiled.tiles * TILE_KERNELS * EFFICIENCY.kernel_seconds
    if config.train.recompute_granularity == "full":
        seconds *= RECOMPUTED
    return seconds / stages


def _estimate_exchange(config: Config, objective: Objective, gpu: Gpu) -> float:
    """Return the seconds that a micro-batch on one stage waits for tensor and pipeline ranks."""
    model, parallel = config.model, config.parallel
    ranks, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    counts = _expect_micro_batch(config, objective)
    size = counts.rows * model.hidden_size
    seconds = 0.0
    if ranks > 1:
        # Two sums of the rows in each direction; recomputation repeats the forward ones.
        sums = 6 if config.train.recompute_granularity == "full" else 4
        volume = 2 * (ranks - 1) / ranks * size * COMPUTE_BYTES[config.train.precision]
        seconds += sums * model.num_layers / stages * volume / (gpu.nvlink * EFFICIENCY.link)
    if stages > 1:
        link = gpu.nvlink if ranks * stages <= GPUS_PER_NODE else gpu.network
        chunks = parallel.virtual_pipeline_model_parallel_size or 1
        hidden = size * FLOAT32_BYTES / parallel.row_multiple
        seconds += 2 * chunks * hidden / (link * EFFICIENCY.link)
    return seconds


def _estimate_reduction(
    config: Config, ranks: int, parameters: int, micro_batch: float, gpu: Gpu
) -> float:
    """Return the seconds of a step that kernels wait for gradients and weights."""
    if ranks == 1:
        return 0.0
    parallel = config.parallel
    sharded = parallel.use_distributed_optimizer
    weights = COMPUTE_BYTES[config.train.precision] if sharded else FLOAT32_BYTES
    volume = (ranks - 1) / ranks * parameters * (FLOAT32_BYTES + weights)
    per_node = max(1, GPUS_PER_NODE // parallel.model_parallel_size)
    link = gpu.nvlink if ranks <= per_node else min(gpu.nvlink, per_node * gpu.network)
    seconds = volume / (link * EFFICIENCY.link)
    hidden = OVERLAPPED * micro_batch if parallel.overlap_grad_reduce else 0.0
    return max(seconds - hidden, 0.05 * seconds)
