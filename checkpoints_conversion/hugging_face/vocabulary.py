"""Adds the mask token's row to embedding and head, and removes it.

Shape suffixes: V rows, C width of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"
MASK_NOISE = 0.01
"""Noise of the mask token's row, in standard deviations of each channel over the other rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedVocabulary:
    """The tokens of a network: those of a tokenizer, with the mask token."""

    size: int
    mask_token_id: int

    @property
    def has_added_mask(self) -> bool:
        """Whether the mask token is the last one, whose row the conversion adds and removes."""
        return self.mask_token_id == self.size - 1

    @property
    def num_kept(self) -> int:
        """Rows of the model from Hugging Face that the network keeps."""
        return self.size - self.has_added_mask


def add_mask_rows(
    tensors: Mapping[str, Tensor], vocabulary: MaskedVocabulary, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Cut embedding and head to the vocabulary, and add the mask token's row.

    The row is the mean of the others plus noise. The rows that are cut belong to no token, so the
    network never predicts them.

    Args:
        tensors: The tensors by the sampler's names; embedding and head have at least
            `vocabulary.num_kept` rows.
        vocabulary: The tokens of the network.
        seed: Seed of the noise.

    Returns:
        The network's tensors; and the rows that were cut, by the same names.
    """
    kept, cut = dict(tensors), {}
    generator = torch.Generator().manual_seed(seed)
    for name in (EMBEDDING, HEAD):
        if name not in tensors:
            continue
        rows_VC = tensors[name][: vocabulary.num_kept]
        if len(tensors[name]) > vocabulary.num_kept:
            cut[name] = tensors[name][vocabulary.num_kept :]
        if vocabulary.has_added_mask:
            std_C, mean_C = torch.std_mean(rows_VC.float(), dim=0, correction=0)
            noise_C = torch.randn(mean_C.shape, generator=generator)
            row_C = mean_C + MASK_NOISE * std_C * noise_C
            rows_VC = torch.cat([rows_VC, row_C[None].to(rows_VC.dtype)])
        kept[name] = rows_VC
    return kept, cut


def remove_mask_rows(
    tensors: Mapping[str, Tensor], cut: Mapping[str, Tensor], num_kept: int
) -> dict[str, Tensor]:
    """Invert `add_mask_rows`: keep `num_kept` rows of embedding and head, and append those cut."""
    restored = dict(tensors)
    for name in (EMBEDDING, HEAD):
        if name in tensors:
            rows_VC = tensors[name][:num_kept]
            restored[name] = torch.cat([rows_VC, cut[name]]) if name in cut else rows_VC
    return restored
