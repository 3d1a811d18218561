"""Floating-point operations that the objective needs.

They count a multiplication and an addition as two, of matrix products only (norms, softmax and
rotary embedding are left out): rows that exist, the causal half of attention, loss rows in the last
layer and the head. No padding, no recomputation.
"""

from megatron_eso.config.model import ModelConfig
from megatron_eso.objectives.objective import Objective
from megatron_eso.objectives.row_counts import RowCounts

BACKWARD_AND_FORWARD = 3
"""A backward pass costs twice its forward pass."""


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


def training_flops_per_token(
    model: ModelConfig, vocab_size: int, objective: Objective, num_tokens: int
) -> float:
    """Return the expected FLOPs of forward and backward pass, per token of a whole sample.

    A token of a sample that `data.ssl_ratio` cuts short needs fewer, for its attention reads less.
    """
    counts = RowCounts()
    for phase, expected in zip(objective.phases, objective.expect_rows(num_tokens), strict=True):
        counts += expected * phase.share
    return BACKWARD_AND_FORWARD * forward_flops(model, vocab_size, counts) / num_tokens
