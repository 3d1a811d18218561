"""Numbers of the reference implementation, and comparisons with them."""

import torch
from torch import Tensor

MASK = 97
"""The mask token of the golden numbers."""


def nll_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Return `-log p(target)` in float64; the mask token has probability 0."""
    logits = logits.to(torch.float64)
    logits[..., MASK] = -torch.inf
    return -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def largest(difference: Tensor) -> float:
    """Return the largest absolute difference."""
    return float(difference.abs().max())
