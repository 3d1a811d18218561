"""Small layers of this model that Megatron-Core does not have.

Shape suffixes: R packed rows (R / TP under sequence parallelism), D hidden size.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import functional


class LayerNorm(torch.nn.Module):
    """A LayerNorm computed in float32 for any input, with Megatron-Core's sequence-parallel mark.

    Megatron-Core's own LayerNorm does not support sequence parallelism. The output has the dtype of
    the parameters.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        mark_sequence_parallel(self, config)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalize the last dimension of `hidden`."""
        normed = functional.layer_norm(
            hidden.float(),
            self.weight.shape,
            self.weight.float(),
            self.bias.float(),
            self.eps,
        )
        return normed.to(self.weight.dtype)


class RMSNorm(torch.nn.Module):
    """An RMSNorm computed in float32 for any input; its output has the dtype of the parameters."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        mark_sequence_parallel(self, config)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalize the last dimension of `hidden`."""
        normed = functional.rms_norm(
            hidden.float(), self.weight.shape, self.weight.float(), self.eps
        )
        return normed.to(self.weight.dtype)


class GatedRowParallelLinear(RowParallelLinear):
    """A RowParallelLinear with a learned `gate` that scales each output channel, bias included.

    The gates start at zero, so no residual branch contributes at the start, as with the reference's
    adaLN (models/dit.py). The export folds the gates into weight and bias.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.gate = torch.nn.Parameter(torch.empty(output_size, dtype=config.params_dtype))
        self.gate.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gated output and the gated bias, which is None without a bias."""
        output, bias = super().forward(input_)
        return output * self.gate, None if bias is None else bias * self.gate


def mark_sequence_parallel(module: torch.nn.Module, config: TransformerConfig) -> None:
    """Mark parameters whose gradients Megatron-Core sums over ranks under sequence parallelism."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def get_bias_dropout_add(
    training: bool, _fused: bool
) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
    """Return a function that adds bias, dropout and residual in the dtype of the residual stream.

    Megatron-Core 0.16.1 casts the residual to the dtype of the branch, which would undo
    `fp32_residual_connection`.
    """

    def bias_dropout_add(
        output_with_bias: tuple[Tensor, Tensor | None], residual_RBD: Tensor, probability: float
    ) -> Tensor:
        output_RBD, bias = output_with_bias
        if bias is not None:
            output_RBD = output_RBD + bias
        dropped_RBD = functional.dropout(output_RBD, p=probability, training=training)
        return residual_RBD + dropped_RBD.to(residual_RBD.dtype)

    return bias_dropout_add
