"""The KV-cached sampler: each step reads the tokens of the last step and this step's masks.

Source: arXiv 2506.01928, section on sampling; `dit.py` (`forward_sample`) and `algo.py` of its
    repository.

Shape suffixes: N samples, T slots, R rows of a step (contiguous slots of each sample), E masks that
a step reveals, K keys, G key/value groups, D head dimension, C width of the model, V vocabulary.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..randomness.bits import uniform
from ..randomness.purposes import Purpose
from .layers_eso_lm import NetworkConfig
from .network_eso_lm import EsoNetworkMixin


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Generation:
    """Result of `EsoLM.generate`."""

    sequences: Tensor
    """Tokens in natural order, int64 `[N, T]`."""
    permutation: Tensor
    """Order of generation, int64 `[N, T]`: `permutation[n, slot] = position`."""
    schedule: list[int] | list[list[int]]
    """Tokens revealed in each step; one list per sample if the samples differ."""
    nfe: int
    """Forward passes of the network for the batch."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenChoice:
    """Parameters by which a token is chosen from logits."""

    temperature: float
    top_p: float
    seed: int
    gumbel: Tensor | None
    """Noise for the logits in slot order, `[N, T, V]`; None draws tokens by the seed."""


class SlotCache:
    """Keys and values in slot order; each step overwrites those of the last step's masks."""

    def __init__(
        self, config: NetworkConfig, num_samples: int, num_slots: int, like: Tensor
    ) -> None:
        """Allocate `num_slots` slots, and one more that padding rows write to."""
        shape = (
            config.num_hidden_layers,
            num_samples,
            num_slots + 1,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)
        self.samples_N1 = torch.arange(num_samples, device=like.device)[:, None]
        self.slots_NR = torch.empty(0)
        self.num_keys = 0

    def place(self, slots_NR: Tensor, num_keys: int) -> None:
        """Set the slots of the next step's rows, int64 `[N, R]`, and its number of keys."""
        self.slots_NR = slots_NR
        self.num_keys = num_keys

    def extend(self, layer: int, key_BRGD: Tensor, value_BRGD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the rows of one layer; return its keys and values, each `[N, K, G, D]`."""
        self.keys[layer][self.samples_N1, self.slots_NR] = key_BRGD
        self.values[layer][self.samples_N1, self.slots_NR] = value_BRGD
        return self.keys[layer][:, : self.num_keys], self.values[layer][:, : self.num_keys]


def cache_bytes(config: NetworkConfig, num_samples: int, num_slots: int, element_bytes: int) -> int:
    """Return the size of a `SlotCache` in bytes."""
    per_slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return num_samples * (num_slots + 1) * per_slot * element_bytes


def memory_bytes(device: torch.device) -> int:
    """Return the memory of a device in bytes; for a CPU, the memory of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def reveal_tokens(
    network: EsoNetworkMixin,
    tokens_NT: Tensor,
    permutation_NT: Tensor,
    schedules: Sequence[Sequence[int]],
    choice: TokenChoice,
) -> int:
    """Reveal the unknown tokens in place, and return the number of forward passes.

    Args:
        network: The network in evaluation mode.
        tokens_NT: Tokens in slot order, int64: known tokens, then mask tokens; overwritten.
        permutation_NT: Order of generation, int64: `permutation[n, slot] = position`.
        schedules: For each sample, the tokens to reveal in each step.
        choice: Parameters by which tokens are chosen.
    """
    num_samples, num_slots = tokens_NT.shape
    mask_token_id = network.network_config.mask_token_id
    cache = SlotCache(network.network_config, num_samples, num_slots, network.embed_tokens.weight)
    device = tokens_NT.device
    # The cache holds the slots before `start`; the tokens before `clean` are known.
    start_N = np.zeros(num_samples, dtype=np.int64)
    clean_N = np.array([num_slots - sum(schedule) for schedule in schedules], dtype=np.int64)
    num_steps = max((len(schedule) for schedule in schedules), default=0)
    for step in range(num_steps):
        # The rows of the step: known tokens that are not in the cache, then the masks to reveal. A
        # sample that is complete has padding rows only.
        reveal_N = np.array([s[step] if step < len(s) else 0 for s in schedules], dtype=np.int64)
        end_N = np.where(reveal_N > 0, clean_N + reveal_N, start_N)
        slots_NR = start_N[:, None] + np.arange((end_N - start_N).max())
        is_real_NR = slots_NR < end_N[:, None]
        is_mask_NR = is_real_NR & (slots_NR >= clean_N[:, None])
        # One forward pass, which gives a token for each mask.
        placed_NR = _placed(slots_NR, is_real_NR, num_slots, device)
        hidden_NRC = _forward_rows(network, cache, tokens_NT, permutation_NT, placed_NR)
        hidden_EC = hidden_NRC[torch.from_numpy(is_mask_NR).to(device)]
        sample_E, row_E = np.nonzero(is_mask_NR)
        slot_E = slots_NR[sample_E, row_E]
        chosen_E = choose_tokens(network.logits(hidden_EC), mask_token_id, sample_E, slot_E, choice)
        # The next step reads the new tokens, since the cache has the keys of their masks.
        where = torch.from_numpy(sample_E).to(device), torch.from_numpy(slot_E).to(device)
        tokens_NT[where] = chosen_E
        start_N = np.where(reveal_N > 0, clean_N, start_N)
        clean_N = clean_N + reveal_N
    return num_steps


def _placed(
    slots_NR: np.ndarray, is_real_NR: np.ndarray, num_slots: int, device: torch.device
) -> Tensor:
    """Return the slots of the rows, int64 `[N, R]`; padding rows have the slot T."""
    return torch.from_numpy(np.where(is_real_NR, slots_NR, num_slots)).to(device)


def _forward_rows(
    network: EsoNetworkMixin,
    cache: SlotCache,
    tokens_NT: Tensor,
    permutation_NT: Tensor,
    slots_NR: Tensor,
) -> Tensor:
    """Compute the hidden states `[N, R, C]` of rows; each reads the slots up to its own."""
    num_slots = tokens_NT.shape[1]
    is_real_NR = slots_NR < num_slots
    num_keys = int(torch.where(is_real_NR, slots_NR, -1).max()) + 1
    cache.place(slots_NR, num_keys)
    keys_K = torch.arange(num_keys, device=slots_NR.device)
    is_visible_NRK = keys_K <= slots_NR[:, :, None]
    readable_NR = slots_NR.clamp(max=num_slots - 1)
    return network.hidden_states(
        tokens_NT.gather(1, readable_NR),
        permutation_NT.gather(1, readable_NR),
        is_visible_NRK,
        cache,
    )


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
