"""The KV-cached sampler over slots: a step reads the last step's tokens and this step's masks.

Source: arXiv 2506.01928, section on sampling; `dit.py` (`forward_sample`) and `algo.py` of its
    repository. Set Diffusion: arXiv 2607.01775.

Shape suffixes: N samples, T slots, R rows of a step, E masks that a step reveals.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..network.masks_eso_lm import set_mask, slot_mask
from ..network.network_eso_lm import EsoNetworkMixin, find_next
from .cache import Int64, Mask, RowCache, StepRows, forward_rows
from .choice import TokenChoice, choose_tokens


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SlotReading:
    """What the rows of a step read, besides the clean slots before their own."""

    prefix_N: Int64
    """Slots that read each other both ways in the sequential phase (variant A); zeros: none.

    Before these are clean, each step is one of the diffusion phase, in which all clean slots do.
    """
    by_sets: bool
    """Whether a mask does not read the masks before it (Set Diffusion)."""
    first_next_N: Int64
    """First slot of the sequential phase, in which a token's row may predict the next token."""


def reveal_slots(
    network: EsoNetworkMixin,
    tokens_NT: Tensor,
    permutation_NT: Tensor,
    schedules: Sequence[Sequence[int]],
    choice: TokenChoice,
    reading: SlotReading,
) -> int:
    """Reveal the unknown tokens in place, and return the number of forward passes.

    Args:
        network: The network in evaluation mode.
        tokens_NT: Tokens in slot order, int64: known tokens, then mask tokens; overwritten.
        permutation_NT: Order of generation, int64: `permutation[n, slot] = position`.
        schedules: For each sample, the tokens to reveal in each step.
        choice: Parameters by which tokens are chosen.
        reading: What the rows of a step read.
    """
    num_samples, num_slots = tokens_NT.shape
    config, device = network.network_config, tokens_NT.device
    cache = RowCache(config, num_samples, num_slots, network.embed_tokens.weight)
    # The cache holds the slots before `start`; the tokens before `clean` are known.
    start_N = np.zeros(num_samples, dtype=np.int64)
    clean_N = np.array([num_slots - sum(schedule) for schedule in schedules], dtype=np.int64)
    is_next_NT = find_next(permutation_NT).cpu().numpy()
    num_steps = max((len(schedule) for schedule in schedules), default=0)
    for step in range(num_steps):
        # The rows of the step: known tokens that are not in the cache, then the masks to reveal,
        # or no mask where the last known token predicts the next one. A sample that is complete has
        # padding rows only. While a two-way prefix grows, all its rows change with it.
        reveal_N = np.array([s[step] if step < len(s) else 0 for s in schedules], dtype=np.int64)
        first_N = np.where(clean_N <= reading.prefix_N, 0, start_N)
        slot_N = np.minimum(clean_N, num_slots - 1)
        is_next_N = is_next_NT[np.arange(num_samples), slot_N] & (clean_N >= reading.first_next_N)
        lag_N = (is_next_N & (reveal_N == 1)).astype(np.int64)
        rows = StepRows(first_N, np.where(reveal_N > 0, clean_N + reveal_N - lag_N, first_N))
        is_chosen_NR = rows.is_real & (rows.numbers >= (clean_N - lag_N)[:, None])
        # One forward pass, which gives a token for each slot to reveal.
        mask = _build_mask(clean_N, reading, device)
        hidden_NRC = forward_rows(network, cache, tokens_NT, permutation_NT, rows, mask)
        hidden_EC = hidden_NRC[torch.from_numpy(is_chosen_NR).to(device)]
        sample_E, row_E = np.nonzero(is_chosen_NR)
        slot_E = rows.numbers[sample_E, row_E] + lag_N[sample_E]
        logits_EV = network.logits(hidden_EC)
        chosen_E = choose_tokens(logits_EV, config.mask_token_id, sample_E, slot_E, choice)
        # The next step reads the new tokens, since the cache has the keys of their masks.
        where = torch.from_numpy(sample_E).to(device), torch.from_numpy(slot_E).to(device)
        tokens_NT[where] = chosen_E
        start_N = np.where(reveal_N > 0, clean_N, start_N)
        clean_N = clean_N + reveal_N
    return num_steps


def _build_mask(clean_N: Int64, reading: SlotReading, device: torch.device) -> Mask:
    """Return the mask of a step in which the slots before `clean` are known."""
    if reading.by_sets:
        known_N = torch.from_numpy(clean_N).to(device)
        return lambda rows_NR, num_keys: set_mask(rows_NR, num_keys, known_N)
    if not reading.prefix_N.any():
        return slot_mask
    prefix_N = torch.from_numpy(np.minimum(clean_N, reading.prefix_N)).to(device)
    return lambda rows_NR, num_keys: slot_mask(rows_NR, num_keys, prefix_N)
