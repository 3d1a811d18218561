"""The KV-cached sampler over blocks: each step computes the block that it reveals tokens of.

A step reveals given positions of one block, by the states of the whole block and of the finished
blocks before it. The rows of a finished block are computed once more with its last tokens, in the
first step of the next block. One block that holds the whole text is the sampler of MDLM.

Sources: arXiv 2503.09573; `diffusion.py` (`_semi_ar_sampler`) of github.com/kuleshov-group/bd3lms.

Shape suffixes: N samples, T positions or slots, R rows of a step, E masks that a step reveals.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..network.masks_eso_lm import block_mask
from ..network.network_eso_lm import EsoNetworkMixin
from .cache import RowCache, StepRows, forward_rows
from .choice import TokenChoice, choose_tokens


def reveal_blocks(
    network: EsoNetworkMixin,
    tokens_NT: Tensor,
    permutation_NT: Tensor,
    schedules: Sequence[Sequence[int]],
    choice: TokenChoice,
    block_size: int,
) -> int:
    """Reveal the unknown tokens in place, and return the number of forward passes.

    Args:
        network: The network in evaluation mode.
        tokens_NT: Tokens in natural order, int64, with mask tokens where unknown; overwritten.
        permutation_NT: Order of generation, int64: known positions, then unknown ones by block.
        schedules: For each sample, the tokens to reveal in each step; no step spans two blocks.
        choice: Parameters by which tokens are chosen.
        block_size: Number of positions in a block; the last block may have fewer.
    """
    num_samples, num_positions = tokens_NT.shape
    config, device = network.network_config, tokens_NT.device
    cache = RowCache(config, num_samples, num_positions, network.embed_tokens.weight)
    order_NT = permutation_NT.cpu().numpy()
    positions_NT = torch.arange(num_positions, device=device).expand_as(tokens_NT)
    # The cache holds the finished positions before `start`; `slot` is the next one to reveal.
    start_N = np.zeros(num_samples, dtype=np.int64)
    slot_N = np.array([num_positions - sum(s) for s in schedules], dtype=np.int64)
    num_steps = max((len(schedule) for schedule in schedules), default=0)
    for step in range(num_steps):
        # The masks to reveal, and the rows up to the end of their block. A sample that is complete
        # has padding rows only.
        reveal_N = np.array([s[step] if step < len(s) else 0 for s in schedules], dtype=np.int64)
        sample_E = np.repeat(np.arange(num_samples), reveal_N)
        first_E = np.repeat(np.cumsum(reveal_N) - reveal_N, reveal_N)
        slot_E = slot_N[sample_E] + np.arange(len(sample_E)) - first_E
        position_E = order_NT[sample_E, slot_E]
        begin_N = start_N.copy()
        begin_N[sample_E] = position_E // block_size * block_size
        end_N = np.minimum(begin_N + block_size, num_positions)
        rows = StepRows(start_N, np.where(reveal_N > 0, end_N, start_N))
        # One forward pass, which gives a token for each mask.
        hidden_NRC = forward_rows(
            network,
            cache,
            tokens_NT,
            positions_NT,
            rows,
            lambda rows_NR, num_keys: block_mask(rows_NR, num_keys, block_size),
        )
        samples = torch.from_numpy(sample_E).to(device)
        hidden_EC = hidden_NRC[samples, torch.from_numpy(position_E - start_N[sample_E]).to(device)]
        logits_EV = network.logits(hidden_EC)
        chosen_E = choose_tokens(logits_EV, config.mask_token_id, sample_E, slot_E, choice)
        tokens_NT[samples, torch.from_numpy(position_E).to(device)] = chosen_E
        start_N, slot_N = begin_N, slot_N + reveal_N
    return num_steps
