"""`BD3LM`: the model of block diffusion; arXiv 2503.09573."""

import torch
from torch import Tensor

from .block_model import BlockModel


class BD3LM(BlockModel):
    """A block diffusion model on one device; keys and values of finished blocks are cached."""

    objective = "bd3_lm"

    @property
    def block_size(self) -> int:
        """Number of positions in a block."""
        return int(self.description["block_size"])

    @torch.no_grad()
    def block_logits(self, z_t: Tensor, x_0: Tensor, block_size: int | None = None) -> Tensor:
        """Compute the logits of all blocks; see `EsoNetworkMixin.block_logits`.

        Args:
            z_t: Text in natural order, int64 `[B, T]`, with the mask token where unknown.
            x_0: The clean text in natural order, int64 `[B, T]`.
            block_size: Number of positions in a block; by default that of training.
        """
        size = self.block_size if block_size is None else block_size
        return self.network.block_logits(z_t, x_0, size)

    def count_block_positions(self, num_positions: int) -> int:
        """Return the number of positions in a block of a text of T positions."""
        return min(self.block_size, num_positions)
