"""Bytes that a run needs: on the fullest rank, and on disk for a checkpoint."""

from dataclasses import dataclass

from megatron_eso.config.sections import Config
from megatron_eso.estimates.activations import COMPUTE_BYTES, FLOAT32_BYTES, RowBytes
from megatron_eso.estimates.largest import LargestBatch, find_largest
from megatron_eso.estimates.parameters import count_parameters, count_rank_parameters
from megatron_eso.objectives.objective import Objective

ADAM_BYTES = 8
EXCHANGED = 2
"""Hidden states on the way between two pipeline stages: one in each direction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes of tensors on a rank at the peak of the largest micro-batch.

    Attributes:
        weights: In the compute type.
        gradients: Float32.
        optimizer: Main parameters and moments.
        ema: The moving average.
        activations: What forward passes keep, and what the backward pass of a layer adds.
        head: Logits of the last stage.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    head: int

    @property
    def state(self) -> int:
        """What a rank holds between steps."""
        return self.weights + self.gradients + self.optimizer + self.ema

    @property
    def total(self) -> int:
        """The sum of all parts, without the memory of CUDA and NCCL."""
        return self.state + self.activations + self.head


def estimate_memory(
    config: Config, vocab_size: int, objective: Objective, data_parallel_size: int
) -> MemoryEstimate:
    """Return the bytes on the fullest rank."""
    estimates = estimate_stages(config, vocab_size, objective, data_parallel_size)
    return max(estimates, key=lambda estimate: estimate.total)


def estimate_stages(
    config: Config, vocab_size: int, objective: Objective, data_parallel_size: int
) -> list[MemoryEstimate]:
    """Return the bytes on a rank of each pipeline stage: the state exact, the rest estimated.

    Args:
        config: The configuration.
        vocab_size: Tokens of the vocabulary, unpadded.
        objective: The objective.
        data_parallel_size: Number of data-parallel ranks.
    """
    parallel = config.parallel
    shards = data_parallel_size if parallel.use_distributed_optimizer else 1
    largest = find_largest(config, objective, data_parallel_size)
    estimates = []
    for stage in range(parallel.pipeline_model_parallel_size):
        parameters = count_rank_parameters(config.model, parallel, vocab_size, stage)
        owned = -(-parameters // shards)
        main = FLOAT32_BYTES if config.train.precision == "bf16" else 0
        activations, head = estimate_activations(config, vocab_size, largest, stage)
        estimates.append(
            MemoryEstimate(
                weights=parameters * COMPUTE_BYTES[config.train.precision],
                gradients=parameters * FLOAT32_BYTES,
                optimizer=owned * (ADAM_BYTES + main),
                ema=owned * FLOAT32_BYTES if config.optimizer.ema_decay else 0,
                activations=activations,
                head=head,
            )
        )
    return estimates


def estimate_activations(
    config: Config, vocab_size: int, largest: LargestBatch, stage: int
) -> tuple[int, int]:
    """Return the bytes of a stage's activations and of its logits at the peak.

    The peak is at the logits where they are larger than what the backward pass of a layer adds to
    what is kept. Else it is in the backward pass of the stage's last layer.

    Args:
        config: The configuration.
        vocab_size: Tokens of the vocabulary, unpadded.
        largest: The largest micro-batch.
        stage: The pipeline stage.
    """
    row, parallel = RowBytes.of(config), config.parallel
    stages = parallel.pipeline_model_parallel_size
    is_last = stage == stages - 1
    rows, loss_rows = largest.rows, largest.loss_rows if is_last else 0
    num_layers = parallel.count_stage_layers(config.model.num_layers, stage)
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    in_flight = count_in_flight(config, largest.num_micro_batches, stage)
    # The layer whose backward pass comes first: the last one of the network, or one of all rows.
    layer = row.layer * rows
    computed, queries = rows, largest.queries
    if is_last:
        layer = row.last_row * rows + row.last_loss_row * loss_rows
        computed = queries = loss_rows
    backward = max(
        row.count_mlp_backward(computed), row.count_attention_backward(computed, queries, rows)
    )
    # What is kept until the backward pass, in every layer and between the stages.
    if config.train.recompute_granularity == "full":
        kept = in_flight * num_layers * row.stream * rows
        kept += row.norm * loss_rows
        backward += layer
    else:
        kept = in_flight * (num_layers * row.layer * rows)
        kept += is_last * (layer - row.layer * rows)
    kept += in_flight * row.rotary * rows
    if stages > 1:
        outputs = in_flight * chunks - is_last
        kept += (outputs + EXCHANGED) * row.stream * rows
    head = row.logit * config.model.pad_vocabulary(vocab_size) * loss_rows
    if head >= backward:
        return round(kept), round(head)
    return round(kept + backward), 0


def count_in_flight(config: Config, num_micro_batches: int, stage: int) -> float:
    """Count the micro-batches that wait for their backward pass, in units of all layers of a stage.

    Each stage has one forward pass ahead for each stage after it; in an interleaved pipeline, two
    for each, and all chunks but one of as many micro-batches as there are stages.
    """
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    ahead = stages - stage - 1
    if chunks > 1:
        ahead = 2 * ahead + (chunks - 1) * stages
    return min(ahead + 1, num_micro_batches * chunks) / chunks


def estimate_checkpoint(config: Config, vocab_size: int) -> int:
    """Return the bytes of one checkpoint: float32 main parameters, Adam's moments, EMA."""
    ema = FLOAT32_BYTES if config.optimizer.ema_decay else 0
    each = FLOAT32_BYTES + ADAM_BYTES + ema
    return each * count_parameters(config.model, vocab_size).total
