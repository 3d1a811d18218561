"""Checks and completes the arguments of generation.

Shape suffixes: N samples, T slots or positions, V vocabulary.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..network.network_eso_lm import EsoNetwork, check_permutation, check_tokens
from .cache import cache_bytes, memory_bytes
from .choice import TokenChoice

MAX_STEPS = 2**24
"""Largest number of time steps; more steps take time and memory and do not change samples."""

Schedule = Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Generation:
    """Result of `generate`."""

    sequences: Tensor
    """Tokens in natural order, int64 `[N, T]`."""
    permutation: Tensor
    """Order of generation, int64 `[N, T]`: `permutation[n, slot] = position`."""
    schedule: list[int] | list[list[int]]
    """Tokens revealed in each step; one list per sample if the samples differ."""
    nfe: int
    """Forward passes of the network for the batch."""


def read_prompt(
    network: EsoNetwork, num_samples: int, prompt: Tensor | None, length: int | None
) -> Tensor:
    """Return the checked prompt on the network's device; without one, mask tokens only.

    Raises:
        ValueError: A size, shape, dtype or token is wrong, or keys and values exceed the memory.
    """
    config = network.network_config
    # Without a prompt nothing is known.
    if not isinstance(num_samples, Integral) or num_samples < 1:
        raise ValueError(f"num_samples is {num_samples!r}, not a whole number from 1")
    if prompt is None:
        length = config.max_length if length is None else length
        if not isinstance(length, Integral) or length < 1:
            raise ValueError(f"length is {length!r}, not a whole number from 1")
        _check_memory(network, num_samples, min(length, config.max_length))
        prompt = torch.full((num_samples, length), config.mask_token_id)
    # Sizes, then values.
    if prompt.dim() != 2 or prompt.shape[0] != num_samples or prompt.shape[1] < 1:
        raise ValueError(
            f"prompt has the shape {list(prompt.shape)}, not [N, T] with N = {num_samples}"
        )
    if length is not None and length != prompt.shape[1]:
        raise ValueError(f"length is {length}, the prompt has T = {prompt.shape[1]}")
    if prompt.shape[1] > config.max_length:
        raise ValueError(f"T = {prompt.shape[1]} is more than max_length = {config.max_length}")
    _check_memory(network, num_samples, prompt.shape[1])
    if prompt.dtype != torch.int64:
        raise ValueError(f"prompt is {prompt.dtype}, not torch.int64")
    check_tokens("prompt", prompt, config.vocab_size)
    return prompt.to(network.embed_tokens.weight.device)


def _check_memory(network: EsoNetwork, num_samples: int, num_slots: int) -> None:
    weight = network.embed_tokens.weight
    needed = cache_bytes(network.network_config, num_samples, num_slots, weight.element_size())
    memory = memory_bytes(weight.device)
    if needed > memory:
        raise ValueError(
            f"num_samples is {num_samples}: keys and values take {needed / 2**30:.3g} GiB, "
            f"more than the {memory / 2**30:.3g} GiB of {weight.device}; sample fewer at once"
        )


def read_choice(
    prompt: Tensor,
    vocab_size: int,
    *,
    temperature: float,
    top_p: float,
    seed: int | None,
    gumbel: Tensor | None,
) -> TokenChoice:
    """Return the checked parameters by which tokens are chosen; draw a seed where none is given.

    Raises:
        ValueError: A number is out of its range, or the noise is not `[N, T, V]`.
    """
    seed = secrets.randbits(63) if seed is None else seed
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, not a finite number of 0 or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, not in (0, 1]")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, not in 0 .. 2**64-1")
    if gumbel is not None and tuple(gumbel.shape) != (*prompt.shape, vocab_size):
        raise ValueError(
            f"gumbel has the shape {list(gumbel.shape)}, not [N, T, V] = "
            f"{[*prompt.shape, vocab_size]}"
        )
    return TokenChoice(temperature=temperature, top_p=top_p, seed=seed, gumbel=gumbel)


def check_schedule(alpha_0: float | None, steps: int | None) -> None:
    """Check the numbers from which a schedule is drawn; None is the default of the objective.

    Raises:
        ValueError: A number is out of its range.
    """
    if alpha_0 is not None and not 0 <= alpha_0 <= 1:
        raise ValueError(f"alpha_0 is {alpha_0}, not in [0, 1]")
    if steps is not None and not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps is {steps}, not in 1 .. {MAX_STEPS}")


def read_order(permutation: Tensor, prompt: Tensor, mask_token_id: int) -> Tensor:
    """Return a given permutation on the prompt's device, checked against the prompt.

    Raises:
        ValueError: It is not a permutation, or a masked token comes before a clean one.
    """
    if permutation.shape != prompt.shape or permutation.dtype != torch.int64:
        raise ValueError(
            f"permutation is {permutation.dtype} {list(permutation.shape)}, not int64 [N, T] = "
            f"{list(prompt.shape)}"
        )
    permutation = permutation.to(prompt.device)
    check_permutation(permutation)
    is_masked = prompt.gather(1, permutation) == mask_token_id
    if bool((is_masked[:, :-1] & ~is_masked[:, 1:]).any()):
        raise ValueError("permutation: a masked token comes before a clean one in slot order")
    return permutation


def read_schedules(schedule: Schedule, unknown_N: Sequence[int]) -> list[list[int]]:
    """Return one list of counts for each sample.

    Args:
        schedule: One list for all samples, or one per sample.
        unknown_N: Number of unknown tokens of each sample.

    Raises:
        ValueError: A list has numbers below 1, or another sum than the sample's unknown tokens.
    """
    rows = _schedule_rows(schedule, len(unknown_N))
    for row, (counts, unknown) in enumerate(zip(rows, unknown_N, strict=True)):
        if any(count < 1 for count in counts) or sum(counts) != unknown:
            raise ValueError(
                f"schedule of sample {row} is not a list of positive numbers with the sum "
                f"{unknown}, the number of unknown tokens"
            )
    return rows


def join_schedules(schedules: list[list[int]]) -> list[int] | list[list[int]]:
    """Return one list if all samples have the same, else all lists."""
    return schedules[0] if all(row == schedules[0] for row in schedules) else schedules


def _schedule_rows(schedule: Any, num_samples: int) -> list[list[int]]:
    """Return one list of ints for each sample."""
    listed = list(schedule)
    is_nested = [
        isinstance(item, Sequence | Tensor | np.ndarray) and np.ndim(item) for item in listed
    ]
    if not any(is_nested):
        return [[int(count) for count in listed]] * num_samples
    if len(listed) != num_samples or not all(is_nested):
        raise ValueError(
            f"schedule is neither a list of ints nor {num_samples} such lists, one per sample"
        )
    return [[int(count) for count in row] for row in listed]
