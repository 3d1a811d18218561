"""Bytes that a run needs: on the fullest rank, and on disk for a checkpoint."""

from dataclasses import dataclass

from megatron_eso.config.sections import Config
from megatron_eso.estimates.parameters import count_parameters, count_rank_parameters
from megatron_eso.objectives.objective import Objective
from megatron_eso.objectives.row_counts import RowCounts

FLOAT32_BYTES = 4
ADAM_BYTES = 8
COMPUTE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes on the fullest rank."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of all parts, without the memory of the framework itself."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations


def estimate_memory(
    config: Config, vocab_size: int, objective: Objective, data_parallel_size: int
) -> MemoryEstimate:
    """Return the bytes on the fullest rank: activations estimated, everything else exact.

    Args:
        config: The configuration.
        vocab_size: Tokens of the vocabulary, unpadded.
        objective: The objective.
        data_parallel_size: Number of data-parallel ranks.
    """
    parallel = config.parallel
    shards = data_parallel_size if parallel.use_distributed_optimizer else 1
    estimates = []
    for stage in range(parallel.pipeline_model_parallel_size):
        parameters = count_rank_parameters(config.model, parallel, vocab_size, stage)
        owned = -(-parameters // shards)
        main = FLOAT32_BYTES if config.train.precision == "bf16" else 0
        estimates.append(
            MemoryEstimate(
                weights=parameters * COMPUTE_BYTES[config.train.precision],
                gradients=parameters * FLOAT32_BYTES,
                optimizer=owned * (ADAM_BYTES + main),
                ema=owned * FLOAT32_BYTES if config.optimizer.ema_decay else 0,
                activations=estimate_activations(config, vocab_size, objective, stage),
            )
        )
    return max(estimates, key=lambda estimate: estimate.total)


def estimate_activations(config: Config, vocab_size: int, objective: Objective, stage: int) -> int:
    """Return the bytes that a stage keeps for its backward pass.

    A row of a layer keeps the inputs of both norms in the residual stream's type and their outputs
    in the compute type, queries, keys, values, attention output, and the MLP's width before and
    after activation. Under full recomputation it keeps the layer's input only, and one layer keeps
    everything. A stage holds one micro-batch for itself and one for each pipeline stage after it.
    The last stage adds float32 logits and their softmax, each once for every loss row.

    Args:
        config: The configuration.
        vocab_size: Tokens of the vocabulary, unpadded.
        objective: The objective.
        stage: The pipeline stage.
    """
    model, parallel = config.model, config.parallel
    compute = COMPUTE_BYTES[config.train.precision]
    residual = FLOAT32_BYTES if model.fp32_residual_connection else compute
    ranks = parallel.tensor_model_parallel_size
    rows_ranks = ranks if parallel.sequence_parallel else 1
    stages = parallel.pipeline_model_parallel_size
    gated = 3 if model.activation == "swiglu" else 2
    heads = 2 * (model.num_attention_heads + model.num_query_groups) * model.head_dim
    # Bytes of a row: the residual stream and norms, then everything in a layer.
    stream = model.hidden_size * residual / rows_ranks
    outer = 2 * stream + 2 * model.hidden_size * compute / rows_ranks
    layer = outer + (heads + gated * model.ffn_hidden_size) * compute / ranks
    # Micro-batches whose activations are alive at once.
    num_layers = parallel.count_stage_layers(model.num_layers, stage)
    in_flight = float(stages - stage)
    if parallel.virtual_pipeline_model_parallel_size:
        in_flight += (stages - 1) / parallel.virtual_pipeline_model_parallel_size
    if config.train.recompute_granularity == "full":
        row = num_layers * stream * in_flight + layer
    else:
        row = num_layers * layer * in_flight
    # All rows of a micro-batch, and the logits on the last stage.
    counts = expect_micro_batch_rows(config, objective)
    total = row * counts.rows
    if stage == stages - 1:
        vocab = model.pad_vocabulary(vocab_size)
        total += 2 * FLOAT32_BYTES * vocab / ranks * counts.loss_rows
    return round(total)


def expect_micro_batch_rows(config: Config, objective: Objective) -> RowCounts:
    """Return the rows of a micro-batch of all phases, or of the larger phase if it holds one."""
    size, shares = config.train.micro_batch_size, [phase.share for phase in objective.phases]
    expected = objective.expect_rows(config.data.sequence_length)
    if not (shares[0] * size).is_integer():
        return max(expected, key=lambda counts: counts.rows) * size
    total = RowCounts()
    for counts, share in zip(expected, shares, strict=True):
        total += counts * (share * size)
    return total


def estimate_checkpoint(config: Config, vocab_size: int) -> int:
    """Return the bytes of one checkpoint: float32 main parameters, Adam's moments, EMA."""
    ema = FLOAT32_BYTES if config.optimizer.ema_decay else 0
    each = FLOAT32_BYTES + ADAM_BYTES + ema
    return each * count_parameters(config.model, vocab_size).total
