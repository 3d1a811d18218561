"""`MDLM`: the model of masked diffusion; arXiv 2406.07524."""

import torch
from torch import Tensor

from .block_model import BlockModel


class MDLM(BlockModel):
    """A masked diffusion model on one device: one block holds the whole text."""

    objective = "mdlm"

    @torch.no_grad()
    def diffusion_logits(self, z_t: Tensor) -> Tensor:
        """Compute logits in natural order; see `EsoNetworkMixin.two_way_logits`."""
        return self.network.two_way_logits(z_t)

    def count_block_positions(self, num_positions: int) -> int:
        """Return the number of positions of the text."""
        return num_positions
