"""Chooses tokens from logits, in exact precision.

Shape suffixes: E masks that a step reveals, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...randomness.bits import uniform
from ...randomness.purposes import Purpose


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenChoice:
    """Parameters by which a token is chosen from logits."""

    temperature: float
    top_p: float
    seed: int
    gumbel: Tensor | None
    """Noise for the logits in slot order, `[N, T, V]`; None draws tokens by the seed."""


def choose_tokens(
    logits_EV: Tensor,
    mask_token_id: int,
    sample_E: np.ndarray,
    slot_E: np.ndarray,
    choice: TokenChoice,
) -> Tensor:
    """Choose a token for each row of logits, int64 `[E]`, never the mask token.

    With given noise the token is `argmax(logits / temperature + gumbel)`. Otherwise the cumulative
    distribution is inverted in float64 at one uniform number per (seed, sample, slot). Temperature
    0 takes the likeliest token.

    Args:
        logits_EV: The logits of the masks that the step reveals.
        mask_token_id: The mask token.
        sample_E: Sample of each mask.
        slot_E: Slot of each mask.
        choice: Parameters by which tokens are chosen.
    """
    logits_EV = logits_EV.clone()
    logits_EV[:, mask_token_id] = -torch.inf
    if choice.temperature == 0:
        return logits_EV.argmax(dim=-1)
    logits_EV = keep_nucleus(logits_EV / choice.temperature, choice.top_p)
    if choice.gumbel is not None:
        device = choice.gumbel.device
        noise_EV = choice.gumbel[
            torch.from_numpy(sample_E).to(device), torch.from_numpy(slot_E).to(device)
        ].to(logits_EV.device)
        return (logits_EV + noise_EV).argmax(dim=-1)
    draws = [
        uniform(choice.seed, Purpose.GENERATION_TOKEN, int(sample), 1, int(slot))[0]
        for sample, slot in zip(sample_E, slot_E, strict=True)
    ]
    cumulative_EV = logits_EV.to(torch.float64).softmax(dim=-1).cumsum(dim=-1)
    total_E1 = cumulative_EV[:, -1:]
    uniform_E1 = torch.tensor(draws, dtype=torch.float64, device=logits_EV.device)[:, None]
    # The product may round up to the total, behind which no token has a probability.
    drawn_E1 = torch.minimum(uniform_E1 * total_E1, total_E1.nextafter(torch.zeros_like(total_E1)))
    return torch.searchsorted(cumulative_EV, drawn_E1, right=True)[:, 0]


def keep_nucleus(logits_EV: Tensor, top_p: float) -> Tensor:
    """Keep the fewest likeliest tokens that reach `top_p` together; set other logits to -inf."""
    if top_p >= 1:
        return logits_EV
    sorted_EV, order_EV = logits_EV.to(torch.float64).sort(dim=-1, descending=True)
    probability_EV = sorted_EV.softmax(dim=-1)
    is_outside_EV = probability_EV.cumsum(dim=-1) - probability_EV >= top_p
    is_outside_EV[:, 0] = False
    return logits_EV.masked_fill(
        torch.zeros_like(is_outside_EV).scatter(1, order_EV, is_outside_EV), -torch.inf
    )
