"""Parameters, floating-point operations, memory and checkpoint size, from the configuration alone.

FLOPs count a multiplication and an addition as two, of matrix products only (norms, softmax and
rotary embedding are left out), and only those that the objective needs: rows that exist, the causal
half of attention, loss rows in the last layer and the head. No padding, no recomputation.

Symbols: T tokens of a sample, m its masked ones.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_eso.config.combinations import check_layout
from megatron_eso.config.model import ModelConfig
from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.config.sections import Config
from megatron_eso.objectives.schedule import EPSILON

BACKWARD_AND_FORWARD = 3
"""A backward pass costs twice its forward pass."""

FLOAT32_BYTES = 4
ADAM_BYTES = 8
COMPUTE_BYTES = {"fp32": 4, "bf16": 2}

Group = Literal["embedding", "layer", "final_norm", "head"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCounts:
    """Numbers of parameters by group, padded vocabulary entries included."""

    embedding: int
    layers: int
    final_norm: int
    head: int

    @property
    def total(self) -> int:
        """All parameters of the model."""
        return self.embedding + self.layers + self.final_norm + self.head


@dataclass(frozen=True, kw_only=True, slots=True)
class RowCounts:
    """What a forward pass has to do, whole numbers or expectations; counts of samples add up."""

    rows: float = 0.0
    """Rows of all layers but the last; the last computes their keys and values only."""
    pairs: float = 0.0
    """Query-key pairs of a layer but the last."""
    loss_rows: float = 0.0
    """Rows with a loss: the rest of the last layer, and the head."""
    loss_pairs: float = 0.0
    """Query-key pairs of the last layer."""

    def __add__(self, other: "RowCounts") -> "RowCounts":
        return RowCounts(
            rows=self.rows + other.rows,
            pairs=self.pairs + other.pairs,
            loss_rows=self.loss_rows + other.loss_rows,
            loss_pairs=self.loss_pairs + other.loss_pairs,
        )

    def __mul__(self, factor: float) -> "RowCounts":
        return RowCounts(
            rows=self.rows * factor,
            pairs=self.pairs * factor,
            loss_rows=self.loss_rows * factor,
            loss_pairs=self.loss_pairs * factor,
        )


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
        """All of it, without the framework's own."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations


def parameter_shapes(model: ModelConfig, vocab_size: int) -> list[tuple[Group, str, int, bool]]:
    """The model's parameters; those of one layer stand for every layer.

    Args:
        model: the transformer.
        vocab_size: tokens of the vocabulary, unpadded.

    Returns:
        Group, name, size, and whether tensor-parallel ranks share it.
    """
    hidden, width = model.hidden_size, model.ffn_hidden_size
    vocab = model.pad_vocabulary(vocab_size)
    qkv = (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim
    fc1 = width * (2 if model.activation == "swiglu" else 1)
    norm = 2 if model.normalization == "LayerNorm" else 1
    shapes: list[tuple[Group, str, int, bool]] = [
        ("embedding", "word_embeddings.weight", vocab * hidden, True),
        ("layer", "input_layernorm", norm * hidden, False),
        ("layer", "linear_qkv.weight", qkv * hidden, True),
        ("layer", "linear_proj.weight", hidden * hidden, True),
        ("layer", "pre_mlp_layernorm", norm * hidden, False),
        ("layer", "linear_fc1.weight", fc1 * hidden, True),
        ("layer", "linear_fc2.weight", width * hidden, True),
        ("final_norm", "final_layernorm", norm * hidden, False),
    ]
    if model.add_bias_linear:
        shapes += [
            ("layer", "linear_qkv.bias", qkv, True),
            ("layer", "linear_proj.bias", hidden, False),
            ("layer", "linear_fc1.bias", fc1, True),
            ("layer", "linear_fc2.bias", hidden, False),
        ]
    if model.qk_layernorm:
        shapes.append(("layer", "q_layernorm and k_layernorm", 2 * norm * model.head_dim, False))
    if model.residual_gates:
        shapes.append(("layer", "linear_proj.gate and linear_fc2.gate", 2 * hidden, False))
    if not model.share_embeddings_and_output_weights:
        shapes.append(("head", "output_layer.weight", vocab * hidden, True))
    if model.head_bias:
        shapes.append(("head", "output_layer.bias", vocab, True))
    return shapes


def count_parameters(model: ModelConfig, vocab_size: int) -> ParameterCounts:
    """Parameters of the whole model, a tied embedding once."""
    shapes = parameter_shapes(model, vocab_size)

    def total(group: Group) -> int:
        return sum(size for found, _, size, _ in shapes if found == group)

    return ParameterCounts(
        embedding=total("embedding"),
        layers=model.num_layers * total("layer"),
        final_norm=total("final_norm"),
        head=total("head"),
    )


def count_rank_parameters(config: Config, vocab_size: int, stage: int) -> int:
    """Parameters on one rank of a pipeline stage; a tied embedding stands on both ends."""
    parallel, model = config.parallel, config.model
    stages = parallel.pipeline_model_parallel_size
    copies = {
        "embedding": int(stage == 0),
        "layer": parallel.count_stage_layers(model.num_layers, stage),
        "final_norm": int(stage == stages - 1),
        "head": int(stage == stages - 1),
    }
    if model.share_embeddings_and_output_weights and stage == stages - 1:
        copies["embedding"] = 1
    return sum(
        copies[group] * (size // parallel.tensor_model_parallel_size if is_shared else size)
        for group, _, size, is_shared in parameter_shapes(model, vocab_size)
    )


def count_diffusion_rows(num_tokens: int, num_masked: int) -> RowCounts:
    """One sample in the diffusion phase: a causal stream of T rows; without a mask no rows."""
    if num_masked == 0:
        return RowCounts()
    return RowCounts(
        rows=num_tokens,
        pairs=num_tokens * (num_tokens + 1) / 2,
        loss_rows=num_masked,
        loss_pairs=count_masked_pairs(num_tokens, num_masked),
    )


def count_sequential_rows(num_tokens: int, num_masked: int) -> RowCounts:
    """One sample in the sequential phase: a clean stream of T - 1 rows and m mask queries."""
    if num_masked == 0:
        return RowCounts()
    queries = count_masked_pairs(num_tokens, num_masked)
    return RowCounts(
        rows=num_tokens - 1 + num_masked,
        pairs=num_tokens * (num_tokens - 1) / 2 + queries,
        loss_rows=num_masked,
        loss_pairs=queries,
    )


def count_masked_pairs(num_tokens: int, num_masked: int) -> float:
    """Keys that the last m of T slots read: the slots before theirs, and themselves."""
    return num_masked * num_tokens - num_masked * (num_masked - 1) / 2


def expect_diffusion_rows(num_tokens: int, objective: ObjectiveConfig) -> RowCounts:
    """The expectation of `count_diffusion_rows` over t in [sampling_eps, 1] and the masks."""
    alpha_0, eps, slope = objective.alpha_0, objective.sampling_eps, 1 - EPSILON
    mean_t, mean_square_t = (1 + eps) / 2, (1 + eps + eps**2) / 3
    rest, rate = 1 - alpha_0, alpha_0 * slope  # the probability of a mask is rest + rate t
    first = rest + rate * mean_t
    second = rest**2 + 2 * rest * rate * mean_t + rate**2 * mean_square_t
    power = num_tokens + 1
    unmasked = alpha_0**num_tokens * ((1 - slope * eps) ** power - (1 - slope) ** power)
    unmasked /= slope * power * (1 - eps)
    return RowCounts(
        rows=num_tokens * (1 - unmasked),
        pairs=num_tokens * (num_tokens + 1) / 2 * (1 - unmasked),
        loss_rows=num_tokens * first,
        loss_pairs=expect_masked_pairs(num_tokens, first, second),
    )


def expect_sequential_rows(num_tokens: int, objective: ObjectiveConfig) -> RowCounts:
    """The expectation of `count_sequential_rows` over the masks."""
    masked = 1 - objective.alpha_0
    some = 1 - objective.alpha_0**num_tokens
    queries = expect_masked_pairs(num_tokens, masked, masked**2)
    return RowCounts(
        rows=(num_tokens - 1) * some + num_tokens * masked,
        pairs=num_tokens * (num_tokens - 1) / 2 * some + queries,
        loss_rows=num_tokens * masked,
        loss_pairs=queries,
    )


def expect_masked_pairs(num_tokens: int, first: float, second: float) -> float:
    """The expectation of `count_masked_pairs`, given that of a mask and of two masks."""
    return num_tokens**2 * first - num_tokens * (num_tokens - 1) / 2 * second


def forward_flops(model: ModelConfig, vocab_size: int, counts: RowCounts) -> float:
    """FLOPs of a forward pass.

    Args:
        model: the transformer.
        vocab_size: tokens of the vocabulary, unpadded.
        counts: rows of any number of samples.
    """
    hidden = model.hidden_size
    key_value = 2 * model.num_query_groups * model.head_dim * hidden
    mlp = (3 if model.activation == "swiglu" else 2) * model.ffn_hidden_size * hidden
    others = 2 * hidden * hidden + mlp  # queries, projection, MLP
    pair = 4 * hidden  # a score and its share of the output
    body = 2 * (key_value + others) * counts.rows + pair * counts.pairs
    last = 2 * (key_value * counts.rows + others * counts.loss_rows) + pair * counts.loss_pairs
    head = 2 * hidden * vocab_size * counts.loss_rows
    return (model.num_layers - 1) * body + last + head


def training_flops_per_token(config: Config, vocab_size: int) -> float:
    """Expected FLOPs of forward and backward pass, per token of a whole sample.

    A token of a sample that `data.ssl_ratio` cuts short needs fewer, for its attention reads less.
    """
    num_tokens, split = config.data.sequence_length, config.objective.batch_split
    counts = expect_diffusion_rows(num_tokens, config.objective) * split
    counts += expect_sequential_rows(num_tokens, config.objective) * (1 - split)
    return BACKWARD_AND_FORWARD * forward_flops(config.model, vocab_size, counts) / num_tokens


def estimate_memory(config: Config, vocab_size: int, world_size: int) -> MemoryEstimate:
    """Bytes on the fullest rank: exact for state, by `estimate_activations` for the rest."""
    parallel = config.parallel
    data_parallel_size = check_layout(config, world_size)
    shards = data_parallel_size if parallel.use_distributed_optimizer else 1
    estimates = []
    for stage in range(parallel.pipeline_model_parallel_size):
        parameters = count_rank_parameters(config, vocab_size, stage)
        owned = -(-parameters // shards)
        main = FLOAT32_BYTES if config.train.precision == "bf16" else 0
        estimates.append(
            MemoryEstimate(
                weights=parameters * COMPUTE_BYTES[config.train.precision],
                gradients=parameters * FLOAT32_BYTES,
                optimizer=owned * (ADAM_BYTES + main),
                ema=owned * FLOAT32_BYTES if config.optimizer.ema_decay else 0,
                activations=estimate_activations(config, vocab_size, stage),
            )
        )
    return max(estimates, key=lambda estimate: estimate.total)


def estimate_activations(config: Config, vocab_size: int, stage: int) -> int:
    """Bytes that a stage keeps for its backward pass.

    Per row of a layer: both norms' inputs in the residual stream's type and outputs in the compute
    type, queries, keys, values, attention output, and the MLP's width before and after activation;
    under full recomputation the layer's input alone, and one layer's all. A stage holds as many
    micro-batches as pipeline stages follow it, itself included. The last stage adds float32
    logits and their softmax, both times the loss rows.
    """
    model, parallel = config.model, config.parallel
    compute = COMPUTE_BYTES[config.train.precision]
    residual = FLOAT32_BYTES if model.fp32_residual_connection else compute
    ranks = parallel.tensor_model_parallel_size
    rows_ranks = ranks if parallel.sequence_parallel else 1
    stages = parallel.pipeline_model_parallel_size
    gated = 3 if model.activation == "swiglu" else 2
    heads = 2 * (model.num_attention_heads + model.num_query_groups) * model.head_dim
    stream = model.hidden_size * residual / rows_ranks
    outer = 2 * stream + 2 * model.hidden_size * compute / rows_ranks
    layer = outer + (heads + gated * model.ffn_hidden_size) * compute / ranks
    num_layers = parallel.count_stage_layers(model.num_layers, stage)
    in_flight = float(stages - stage)
    if parallel.virtual_pipeline_model_parallel_size:
        in_flight += (stages - 1) / parallel.virtual_pipeline_model_parallel_size
    if config.train.recompute_granularity == "full":
        row = num_layers * stream * in_flight + layer
    else:
        row = num_layers * layer * in_flight
    counts = expect_micro_batch_rows(config)
    total = row * counts.rows
    if stage == stages - 1:
        vocab = model.pad_vocabulary(vocab_size)
        total += 2 * FLOAT32_BYTES * vocab / ranks * counts.loss_rows
    return round(total)


def expect_micro_batch_rows(config: Config) -> RowCounts:
    """Rows of the larger kind of micro-batch: of the mix, or of the sequential phase alone."""
    num_tokens, size = config.data.sequence_length, config.train.micro_batch_size
    split = config.objective.batch_split
    if not (split * size).is_integer():
        split = 0.0
    diffusion = expect_diffusion_rows(num_tokens, config.objective) * (split * size)
    return diffusion + expect_sequential_rows(num_tokens, config.objective) * ((1 - split) * size)


def estimate_checkpoint(config: Config, vocab_size: int) -> int:
    """Bytes of one distributed checkpoint: float32 main parameters, Adam's moments, EMA."""
    ema = FLOAT32_BYTES if config.optimizer.ema_decay else 0
    each = FLOAT32_BYTES + ADAM_BYTES + ema
    return each * count_parameters(config.model, vocab_size).total
