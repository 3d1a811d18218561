"""`EsoLM`: the model of a sampler directory, with scoring and generation.

Shape suffixes: B and N samples, T slots, V vocabulary.
"""

import secrets
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from .directory import load_network, read_description
from .generation import Generation, TokenChoice, cache_bytes, memory_bytes, reveal_tokens
from .network_eso_lm import EsoNetwork, check_permutation, check_tokens
from .ordering import RevealPlan, draw_order, plan_ancestral, plan_given

MAX_STEPS = 2**24
"""Largest number of time steps; more steps take time and memory and do not change samples."""

Schedule = Sequence[int] | Sequence[Sequence[int]]


class EsoLM:
    """An Eso-LM of variant B on one device."""

    def __init__(self, network: EsoNetwork, *, alpha_0: float) -> None:
        """Wrap a network.

        Args:
            network: The network in evaluation mode.
            alpha_0: The value of training, which is the default of `generate`.
        """
        self.network = network
        self.config = network.network_config
        self.alpha_0 = alpha_0

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Self:
        """Load a sampler directory.

        Args:
            directory: A directory that `checkpoints_conversion` wrote.
            dtype: Dtype of the weights; norms, residual stream and logits have at least float32.
            device: Device on which the model runs.

        Raises:
            CheckpointError: A file is missing or damaged, or its version is unknown.
        """
        alpha_0 = float(read_description(directory)["alpha_0"])
        return cls(load_network(directory, dtype, str(device)), alpha_0=alpha_0)

    @property
    def device(self) -> torch.device:
        """Device on which the model runs."""
        return self.network.embed_tokens.weight.device

    @torch.no_grad()
    def diffusion_logits(self, z_t: Tensor, permutation: Tensor) -> Tensor:
        """Compute the logits of the diffusion phase; see `EsoNetworkMixin.diffusion_logits`."""
        return self.network.diffusion_logits(z_t, permutation)

    @torch.no_grad()
    def sequential_logits(self, z_0: Tensor, x_0: Tensor, permutation: Tensor) -> Tensor:
        """Compute the logits of the sequential phase; see `EsoNetworkMixin.sequential_logits`."""
        return self.network.sequential_logits(z_0, x_0, permutation)

    @torch.no_grad()
    def token_log_likelihoods(self, x_0: Tensor, permutation: Tensor) -> Tensor:
        """Compute log p(token of a slot | tokens of the earlier slots), float64 `[B, T]`.

        Args:
            x_0: Text in natural order, int64 `[B, T]`; the mask token has probability 0.
            permutation: Order of the slots, int64 `[B, T]`: `permutation[b, slot] = position`.

        Returns:
            Natural logarithms in slot order.

        Raises:
            ValueError: A shape, dtype or token is wrong, or `T > max_length`.
        """
        masked = torch.full_like(x_0, self.config.mask_token_id)
        logits_BTV = self.network.sequential_logits(masked, x_0, permutation).to(torch.float64)
        logits_BTV[:, :, self.config.mask_token_id] = -torch.inf
        targets_BT1 = x_0.gather(1, permutation)[:, :, None]
        return logits_BTV.log_softmax(dim=-1).gather(2, targets_BT1)[:, :, 0]

    def log_likelihood(self, x_0: Tensor, permutation: Tensor) -> Tensor:
        """Compute the exact log-likelihood of each text in the given order, float64 `[B]`.

        Arguments and errors are those of `token_log_likelihoods`.
        """
        return self.token_log_likelihoods(x_0, permutation).sum(dim=1)

    @torch.no_grad()
    def generate(  # noqa: PLR0913 - the contract's signature
        self,
        num_samples: int,
        prompt: Tensor | None = None,
        schedule: Schedule | None = None,
        permutation: Tensor | None = None,
        gumbel: Tensor | None = None,
        *,
        length: int | None = None,
        alpha_0: float | None = None,
        steps: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Generation:
        """Sample texts, or fill in prompts.

        A sample depends on the seed and its number in the batch, and not on the other samples (up
        to the rounding of matrix products).

        Args:
            num_samples: Number N of samples.
            prompt: Text in natural order, int64 `[N, T]`, with the mask token where unknown.
            schedule: Tokens to reveal in each step, all unknown ones together; one list per sample
                if these differ. Default: the paper's ancestral one, then one token at a time.
            permutation: Order of generation, int64 `[N, T]`, with the known positions in the first
                slots. Default: random up to `alpha_0 T` slots, then left to right.
            gumbel: Noise in slot order, `[N, T, V]`: an unknown token is
                `argmax(logits / temperature + gumbel)`.
            length: T without a prompt; default `max_length`.
            alpha_0: Share of the tokens that the diffusion phase reveals; default that of training.
            steps: Time steps of the ancestral schedule; default T.
            temperature: Divisor of the logits; 0 takes the likeliest token.
            top_p: Keeps the fewest likeliest tokens whose probabilities sum to at least this.
            seed: Seed of all random numbers; None takes one from the operating system.

        Raises:
            ValueError: A masked token comes before a clean one in slot order, `T > max_length`, a
                shape does not fit, or a number is out of its range.
        """
        prompt = self._prompt(num_samples, prompt, length)
        num_slots = prompt.shape[1]
        alpha_0 = self.alpha_0 if alpha_0 is None else alpha_0
        steps = num_slots if steps is None else steps
        seed = secrets.randbits(63) if seed is None else seed
        _check_ranges(alpha_0=alpha_0, steps=steps, temperature=temperature, top_p=top_p, seed=seed)
        self._check_gumbel(gumbel, prompt)
        is_known_NT = (prompt != self.config.mask_token_id).cpu().numpy()
        plans = _plan_rows(is_known_NT, schedule, seed, alpha_0, steps)
        if permutation is None:
            permutation = _draw_orders(seed, is_known_NT, plans)
        permutation = self._order(permutation, prompt)
        tokens = prompt.gather(1, permutation)
        choice = TokenChoice(temperature=temperature, top_p=top_p, seed=seed, gumbel=gumbel)
        schedules = [plan.schedule for plan in plans]
        nfe = reveal_tokens(self.network, tokens, permutation, schedules, choice)
        sequences = torch.empty_like(tokens).scatter_(1, permutation, tokens)
        return Generation(
            sequences=sequences, permutation=permutation, schedule=_join(schedules), nfe=nfe
        )

    def _prompt(self, num_samples: int, prompt: Tensor | None, length: int | None) -> Tensor:
        """Return the checked prompt on the model's device; without one, mask tokens only."""
        if not isinstance(num_samples, Integral) or num_samples < 1:
            raise ValueError(f"num_samples is {num_samples!r}, not a whole number from 1")
        if prompt is None:
            length = self.config.max_length if length is None else length
            if not isinstance(length, Integral) or length < 1:
                raise ValueError(f"length is {length!r}, not a whole number from 1")
            self._check_memory(num_samples, min(length, self.config.max_length))
            prompt = torch.full((num_samples, length), self.config.mask_token_id)
        if prompt.dim() != 2 or prompt.shape[0] != num_samples or prompt.shape[1] < 1:
            raise ValueError(
                f"prompt has the shape {list(prompt.shape)}, not [N, T] with N = {num_samples}"
            )
        if length is not None and length != prompt.shape[1]:
            raise ValueError(f"length is {length}, the prompt has T = {prompt.shape[1]}")
        if prompt.shape[1] > self.config.max_length:
            raise ValueError(
                f"T = {prompt.shape[1]} is more than max_length = {self.config.max_length}"
            )
        self._check_memory(num_samples, prompt.shape[1])
        if prompt.dtype != torch.int64:
            raise ValueError(f"prompt is {prompt.dtype}, not torch.int64")
        check_tokens("prompt", prompt, self.config.vocab_size)
        return prompt.to(self.device)

    def _check_memory(self, num_samples: int, num_slots: int) -> None:
        weight = self.network.embed_tokens.weight
        needed = cache_bytes(self.config, num_samples, num_slots, weight.element_size())
        memory = memory_bytes(self.device)
        if needed > memory:
            raise ValueError(
                f"num_samples is {num_samples}: keys and values take {needed / 2**30:.3g} GiB, "
                f"more than the {memory / 2**30:.3g} GiB of {self.device}; sample fewer at once"
            )

    def _check_gumbel(self, gumbel: Tensor | None, prompt: Tensor) -> None:
        if gumbel is not None and tuple(gumbel.shape) != (*prompt.shape, self.config.vocab_size):
            raise ValueError(
                f"gumbel has the shape {list(gumbel.shape)}, not [N, T, V] = "
                f"{[*prompt.shape, self.config.vocab_size]}"
            )

    def _order(self, permutation: Tensor, prompt: Tensor) -> Tensor:
        """Return the permutation on the model's device, checked against the prompt."""
        if permutation.shape != prompt.shape or permutation.dtype != torch.int64:
            raise ValueError(
                f"permutation is {permutation.dtype} {list(permutation.shape)}, not int64 [N, T] = "
                f"{list(prompt.shape)}"
            )
        permutation = permutation.to(self.device)
        check_permutation(permutation)
        is_masked = prompt.gather(1, permutation) == self.config.mask_token_id
        if bool((is_masked[:, :-1] & ~is_masked[:, 1:]).any()):
            raise ValueError("permutation: a masked token comes before a clean one in slot order")
        return permutation


def _check_ranges(
    *, alpha_0: float, steps: int, temperature: float, top_p: float, seed: int
) -> None:
    if not 0 <= alpha_0 <= 1:
        raise ValueError(f"alpha_0 is {alpha_0}, not in [0, 1]")
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps is {steps}, not in 1 .. {MAX_STEPS}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, not a finite number of 0 or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, not in (0, 1]")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, not in 0 .. 2**64-1")


def _plan_rows(
    is_known_NT: np.ndarray, schedule: Schedule | None, seed: int, alpha_0: float, steps: int
) -> list[RevealPlan]:
    """Plan the generation of each sample, by the given schedule or a drawn one."""
    num_samples, num_slots = is_known_NT.shape
    known_N = [int(count) for count in is_known_NT.sum(axis=1)]
    if schedule is None:
        return [plan_ancestral(seed, num_slots, known, alpha_0, steps) for known in known_N]
    given = _schedule_rows(schedule, num_samples)
    for row, (counts, known) in enumerate(zip(given, known_N, strict=True)):
        if any(count < 1 for count in counts) or sum(counts) != num_slots - known:
            raise ValueError(
                f"schedule of sample {row} is no list of positive numbers with the sum "
                f"{num_slots - known}, the number of unknown tokens"
            )
    return [
        plan_given(counts, num_slots, known, alpha_0)
        for counts, known in zip(given, known_N, strict=True)
    ]


def _draw_orders(seed: int, is_known_NT: np.ndarray, plans: Sequence[RevealPlan]) -> Tensor:
    """Draw a permutation for each sample, int64 `[N, T]`."""
    orders = [
        draw_order(seed, row, is_known_NT[row], plan.num_random) for row, plan in enumerate(plans)
    ]
    return torch.from_numpy(np.stack(orders))


def _join(schedules: list[list[int]]) -> list[int] | list[list[int]]:
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
