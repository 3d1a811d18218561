"""The KV-cached sampler of AR: each step computes the last tokens, and reveals the next one.

Shape suffixes: N samples, T positions, S = T or T + 1 rows, E samples that get a token.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..network.masks_eso_lm import slot_mask
from ..network.network_eso_lm import EsoNetworkMixin
from .cache import Int64, RowCache, StepRows, forward_rows
from .choice import TokenChoice, choose_tokens


def reveal_next_tokens(
    network: EsoNetworkMixin,
    tokens_NT: Tensor,
    known_N: Int64,
    choice: TokenChoice,
    prepended: int | None,
) -> int:
    """Reveal the unknown tokens in place, and return the number of forward passes.

    Args:
        network: The network in evaluation mode.
        tokens_NT: Tokens in natural order, int64: a known prefix, then mask tokens; overwritten.
        known_N: Number of known tokens; at least 1 without a prepended token.
        choice: Parameters by which tokens are chosen.
        prepended: Token of a row before the text; None: there is none.
    """
    num_samples, num_positions = tokens_NT.shape
    config, device = network.network_config, tokens_NT.device
    # Rows: the prepended token, then the text.
    offset = 0 if prepended is None else 1
    rows_NS = F.pad(tokens_NT, (offset, 0), value=prepended or 0)
    positions_NS = torch.arange(rows_NS.shape[1], device=device).expand_as(rows_NS)
    cache = RowCache(config, num_samples, rows_NS.shape[1], network.embed_tokens.weight)
    start_N, known_N = np.zeros(num_samples, dtype=np.int64), known_N.copy()
    num_steps = int((num_positions - known_N).max())
    for _ in range(num_steps):
        # The rows of known tokens that are not in the cache; a complete sample has padding only.
        is_open_N = known_N < num_positions
        rows = StepRows(start_N, np.where(is_open_N, known_N + offset, start_N))
        hidden_NRC = forward_rows(network, cache, rows_NS, positions_NS, rows, slot_mask)
        # The last row of a sample gives its next token.
        sample_E = np.nonzero(is_open_N)[0]
        slot_E = known_N[sample_E]
        last_E = rows.end_N[sample_E] - rows.first_N[sample_E] - 1
        samples = torch.from_numpy(sample_E).to(device)
        logits_EV = network.logits(hidden_NRC[samples, torch.from_numpy(last_E).to(device)])
        chosen_E = choose_tokens(logits_EV, config.mask_token_id, sample_E, slot_E, choice)
        rows_NS[samples, torch.from_numpy(slot_E + offset).to(device)] = chosen_E
        start_N, known_N = rows.end_N, known_N + is_open_N
    tokens_NT.copy_(rows_NS[:, offset:])
    return num_steps
