"""Masks of the objectives: which row of the network reads which key.

A sampler directory holds a copy of this file, so it imports torch only. Each function returns a
bool tensor `[B, R, K]`, with B = 1 where the samples do not differ; True means that the row reads
the key. Paper: arXiv 2506.01928; reference: `models/dit.py` of its repository.

Shape suffixes: B samples, T slots or positions, R rows of a forward pass, K keys.
"""

import torch
from torch import Tensor


def slot_mask(rows_BR: Tensor, num_keys: int, prefix_B: Tensor | None = None) -> Tensor:
    """Return the mask of rows that read the slots up to their own.

    Args:
        rows_BR: Slots of the rows, int64.
        num_keys: Number K of keys, which are the slots 0 .. K-1.
        prefix_B: Number of leading slots that read each other both ways, int64 (variant A of
            Eso-LM); None: none.
    """
    keys_K = torch.arange(num_keys, device=rows_BR.device)
    is_visible_BRK = keys_K <= rows_BR[:, :, None]
    if prefix_B is not None:
        prefix_B11 = prefix_B[:, None, None]
        is_visible_BRK = is_visible_BRK | (rows_BR[:, :, None] < prefix_B11) & (keys_K < prefix_B11)
    return is_visible_BRK


def set_mask(rows_BR: Tensor, num_keys: int, clean_B: Tensor) -> Tensor:
    """Return the mask of rows of which a masked one reads the clean slots, and itself.

    Args:
        rows_BR: Slots of the rows, int64.
        num_keys: Number K of keys, which are the slots 0 .. K-1.
        clean_B: Number of clean slots, int64; a clean slot reads the slots up to its own.
    """
    keys_K = torch.arange(num_keys, device=rows_BR.device)
    is_own_BRK = keys_K == rows_BR[:, :, None]
    return slot_mask(rows_BR, num_keys) & (is_own_BRK | (keys_K < clean_B[:, None, None]))


def query_mask(slots_T: Tensor, query_slots_M: Tensor, prefix_B: Tensor | None = None) -> Tensor:
    """Return the mask of a clean stream of all slots, followed by queries.

    A clean row reads the clean rows up to its slot; a query reads those strictly before its slot,
    and itself.

    Args:
        slots_T: The slots of the clean stream, 0 .. T-1.
        query_slots_M: The slot of each query.
        prefix_B: As in `slot_mask`, for the clean rows.
    """
    num_slots, num_queries = len(slots_T), len(query_slots_M)
    is_clean_visible_BTT = slot_mask(slots_T[None], num_slots, prefix_B)
    is_query_visible_MT = slots_T < query_slots_M[:, None]
    batch = is_clean_visible_BTT.shape[0]
    none_TM = is_query_visible_MT.new_zeros(num_slots, num_queries)
    own_MM = torch.eye(num_queries, dtype=torch.bool, device=slots_T.device)
    queries_MR = torch.cat([is_query_visible_MT, own_MM], dim=1)
    clean_BTR = torch.cat([is_clean_visible_BTT, none_TM.expand(batch, -1, -1)], dim=2)
    return torch.cat([clean_BTR, queries_MR.expand(batch, -1, -1)], dim=1)


def block_mask(rows_BR: Tensor, num_keys: int, block_size: int) -> Tensor:
    """Return the mask of rows that read their own block and the blocks before it.

    Args:
        rows_BR: Positions of the rows, int64.
        num_keys: Number K of keys, which are the positions 0 .. K-1.
        block_size: Number of positions in a block.
    """
    blocks_K = torch.arange(num_keys, device=rows_BR.device) // block_size
    return blocks_K <= (rows_BR // block_size)[:, :, None]


def block_stream_mask(positions_T: Tensor, num_clean: int, block_size: int) -> Tensor:
    """Return the mask of block diffusion: a clean stream, followed by all noisy blocks.

    A clean row reads the clean rows of its own block and of the blocks before it. A noisy row reads
    the clean rows of the blocks before its own, and the noisy rows of its own block. Source: arXiv
    2503.09573; `block_diff_mask` of github.com/kuleshov-group/bd3lms, `models/dit.py`.

    Args:
        positions_T: All positions, 0 .. T-1.
        num_clean: Number of rows of the clean stream, which has the first positions.
        block_size: Number of positions in a block.
    """
    noisy_blocks_T = positions_T // block_size
    clean_blocks_K = noisy_blocks_T[:num_clean]
    clean_rows_KR = torch.cat(
        [
            clean_blocks_K <= clean_blocks_K[:, None],
            torch.zeros(num_clean, len(positions_T), dtype=torch.bool, device=positions_T.device),
        ],
        dim=1,
    )
    noisy_rows_TR = torch.cat(
        [clean_blocks_K < noisy_blocks_T[:, None], noisy_blocks_T == noisy_blocks_T[:, None]], dim=1
    )
    return torch.cat([clean_rows_KR, noisy_rows_TR])[None]
