"""Numbers of parameters: of the whole model, and of one rank."""

from dataclasses import dataclass
from typing import Literal

from megatron_eso.config.model import ModelConfig
from megatron_eso.config.sections import ParallelConfig

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


def parameter_shapes(model: ModelConfig, vocab_size: int) -> list[tuple[Group, str, int, bool]]:
    """List the model's parameters; those of one layer stand for every layer.

    Args:
        model: The transformer.
        vocab_size: Tokens of the vocabulary, unpadded.

    Returns:
        Group, name, size, and whether tensor-parallel ranks share it.
    """
    hidden, width = model.hidden_size, model.ffn_hidden_size
    vocab = model.pad_vocabulary(vocab_size)
    qkv = (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
    fc1 = width * (2 if model.activation == "swiglu" else 1)
    norm = 2 if model.normalization == "LayerNorm" else 1
    # What every model has.
    shapes: list[tuple[Group, str, int, bool]] = [
        ("embedding", "word_embeddings.weight", vocab * hidden, True),
        ("layer", "input_layernorm", norm * hidden, False),
        ("layer", "linear_qkv.weight", qkv * hidden, True),
        ("layer", "linear_proj.weight", model.query_size * hidden, True),
        ("layer", "pre_mlp_layernorm", norm * hidden, False),
        ("layer", "linear_fc1.weight", fc1 * hidden, True),
        ("layer", "linear_fc2.weight", width * hidden, True),
        ("final_norm", "final_layernorm", norm * hidden, False),
    ]
    # What depends on the section `model`.
    if model.has_qkv_bias:
        shapes.append(("layer", "linear_qkv.bias", qkv, True))
    if model.add_bias_linear:
        shapes += [
            ("layer", "linear_proj.bias", hidden, False),
            ("layer", "linear_fc1.bias", fc1, True),
            ("layer", "linear_fc2.bias", hidden, False),
        ]
    if model.qk_layernorm:
        shapes.append(("layer", "q_layernorm and k_layernorm", 2 * norm * model.kv_channels, False))
    if model.residual_gates:
        shapes.append(("layer", "linear_proj.gate and linear_fc2.gate", 2 * hidden, False))
    if not model.share_embeddings_and_output_weights:
        shapes.append(("head", "output_layer.weight", vocab * hidden, True))
    if model.head_bias:
        shapes.append(("head", "output_layer.bias", vocab, True))
    return shapes


def count_parameters(model: ModelConfig, vocab_size: int) -> ParameterCounts:
    """Count the parameters of the whole model; a tied embedding counts once."""
    shapes = parameter_shapes(model, vocab_size)

    def total(group: Group) -> int:
        return sum(size for found, _, size, _ in shapes if found == group)

    return ParameterCounts(
        embedding=total("embedding"),
        layers=model.num_layers * total("layer"),
        final_norm=total("final_norm"),
        head=total("head"),
    )


def count_rank_parameters(
    model: ModelConfig, parallel: ParallelConfig, vocab_size: int, stage: int
) -> int:
    """Count the parameters on one rank of a stage; a tied embedding counts on both end stages.

    Args:
        model: The section `model`.
        parallel: The section `parallel`.
        vocab_size: Tokens of the vocabulary, unpadded.
        stage: The pipeline stage.
    """
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
