"""Floating-point operations that the objective needs.

Only matrix products count, a multiplication and an addition as two operations; norms, softmax and
rotary embedding do not. Counted are the rows that exist, the causal half of attention, and the loss
rows in the last layer and the head. Padding and recomputation are not counted.
"""

from megatron_eso.config.model import ModelConfig
from megatron_eso.objectives.objective import Objective
from megatron_eso.objectives.row_counts import RowCounts

BACKWARD_AND_FORWARD = 3
"""A backward pass costs twice its forward pass."""


def forward_flops(model: ModelConfig, vocab_size: int, counts: RowCounts) -> float:
    """Return the FLOPs of a forward pass.

    Args:
        model: The transformer.
        vocab_size: Tokens of the vocabulary, unpadded.
        counts: Rows of any number of samples.
    """
    hidden = model.hidden_size
    key_value = 2 * model.num_query_groups * model.kv_channels * hidden
    mlp = (3 if model.activation == "swiglu" else 2) * model.ffn_hidden_size * hidden
    others = 2 * model.query_size * hidden + mlp  # queries, projection, MLP
    pair = 4 * model.query_size  # a score and its share of the output
    body = 2 * (key_value + others) * counts.rows + pair * counts.pairs
    last = 2 * (key_value * counts.rows + others * counts.loss_rows) + pair * counts.loss_pairs
    head = 2 * hidden * vocab_size * counts.loss_rows
    return (model.num_layers - 1) * body + last + head


def training_flops_per_token(
    model: ModelConfig, vocab_size: int, objective: Objective, num_tokens: int
) -> float:
    """Return the expected FLOPs of forward and backward pass, per token of a whole sample.

    A token of a sample that `data.ssl_ratio` shortens needs fewer: its attention reads less.

    Args:
        model: The section `model`.
        vocab_size: Tokens of the vocabulary, unpadded.
        objective: The objective.
        num_tokens: Tokens of a whole sample.
    """
    counts = RowCounts()
    for phase, expected in zip(objective.phases, objective.expect_rows(num_tokens), strict=True):
        counts += expected * phase.share
    return BACKWARD_AND_FORWARD * forward_flops(model, vocab_size, counts) / num_tokens
