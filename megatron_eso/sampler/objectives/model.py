"""`SamplerModel`: what the models of all objectives share.

Shape suffixes: B and N samples, T slots or positions, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError
from ..network.directory import load_network, read_description
from ..network.network_eso_lm import EsoNetwork
from ..steps.choice import TokenChoice
from ..steps.inputs import (
    Generation,
    Schedule,
    check_schedule,
    join_schedules,
    read_choice,
    read_order,
    read_prompt,
    read_schedules,
)
from ..steps.ordering import Bool, RevealPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """What the plan of a sample is made from."""

    seed: int
    row: int
    """Number of the sample in the batch."""
    is_known_T: Bool
    """Which positions are known."""
    schedule: list[int] | None
    """Tokens to reveal in each step; None draws them."""
    steps: int | None
    """Time steps of the diffusion; None takes the objective's default."""
    alpha_0: float | None
    """Share of tokens that the diffusion phase reveals; None takes that of training."""


class SamplerModel(ABC):
    """A model of one objective on one device."""

    objective: ClassVar[str]
    """`objective` in `config.json`."""
    has_exact_likelihood: ClassVar[bool] = False
    """Whether `score_left_to_right` exists."""

    def __init__(self, network: EsoNetwork, description: Mapping[str, Any]) -> None:
        """Wrap a network.

        Args:
            network: The network in evaluation mode.
            description: The fields of the objective in `config.json`.
        """
        self.network = network
        self.config = network.network_config
        self.description = dict(description)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Self:
        """Load a sampler directory of this objective.

        Args:
            directory: A directory that `checkpoints_conversion` wrote.
            dtype: Dtype of the weights; norms, residual stream and logits have at least float32.
            device: Device on which the model runs.

        Raises:
            CheckpointError: A file is missing or damaged, its version is unknown, or the directory
                is of another objective.
        """
        description = read_description(directory)
        if description["objective"] != cls.objective:
            raise CheckpointError(
                f"{Path(directory) / 'config.json'}: objective is {description['objective']}, not "
                f"{cls.objective}; open the directory by megatron_eso.sampler.load"
            )
        return cls(load_network(directory, dtype, str(device)), description)

    @property
    def device(self) -> torch.device:
        """Device on which the model runs."""
        return self.network.embed_tokens.weight.device

    def score_left_to_right(self, x_0: Tensor) -> Tensor:
        """Compute log p(token | the tokens before it) where the objective has it, float64.

        Args:
            x_0: Text in natural order, int64 `[B, T]`; the mask token has probability 0.

        Returns:
            `[B, T]` in natural order, or `[B, T - 1]` where the first token has no distribution.

        Raises:
            ValueError: The objective has no exact likelihood, a shape, dtype or token is wrong, or
                `T > max_length`.
        """
        raise ValueError(f"objective {self.objective} has no exact likelihood")

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
                if these differ. Default: that of the objective.
            permutation: Order of generation, int64 `[N, T]`, with the known positions in the first
                slots. Default: drawn as the objective does.
            gumbel: Noise in slot order, `[N, T, V]`: an unknown token is
                `argmax(logits / temperature + gumbel)`.
            length: T without a prompt; default `max_length`.
            alpha_0: Share of the tokens that the diffusion phase of Eso-LM reveals; default that of
                training.
            steps: Time steps of the objective's schedule.
            temperature: Divisor of the logits; 0 takes the likeliest token.
            top_p: Keeps the fewest likeliest tokens whose probabilities sum to at least this.
            seed: Seed of all random numbers; None takes one from the operating system.

        Raises:
            ValueError: A masked token comes before a clean one in slot order, `T > max_length`, a
                shape does not fit, a number is out of its range, or the objective has no such
                prompt, order or schedule.
        """
        prompt = read_prompt(self.network, num_samples, prompt, length)
        choice = read_choice(
            prompt,
            self.config.vocab_size,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            gumbel=gumbel,
        )
        # The plans: a given schedule or order takes the place of the drawn one.
        unknown_N = (prompt == self.config.mask_token_id).sum(1).tolist()
        given = None if schedule is None else read_schedules(schedule, unknown_N)
        plans = self._plan_samples(prompt, given, seed=choice.seed, steps=steps, alpha_0=alpha_0)
        return self._follow_plans(prompt, permutation, plans, choice)

    def _plan_samples(
        self,
        prompt: Tensor,
        given: list[list[int]] | None,
        *,
        seed: int,
        steps: int | None,
        alpha_0: float | None,
    ) -> list[RevealPlan]:
        """Plan the generation of every sample, by the given schedules or drawn ones."""
        check_schedule(alpha_0, steps)
        if alpha_0 is not None and "alpha_0" not in self.description:
            raise ValueError(
                f"alpha_0 is {alpha_0}, but objective {self.objective} has none; leave it out"
            )
        is_known_NT = (prompt != self.config.mask_token_id).cpu().numpy()
        return [
            self._plan(
                PlanRequest(
                    seed=seed,
                    row=row,
                    is_known_T=is_known_T,
                    schedule=None if given is None else given[row],
                    steps=steps,
                    alpha_0=alpha_0,
                )
            )
            for row, is_known_T in enumerate(is_known_NT)
        ]

    def _follow_plans(
        self,
        prompt: Tensor,
        permutation: Tensor | None,
        plans: list[RevealPlan],
        choice: TokenChoice,
    ) -> Generation:
        """Reveal the unknown tokens of prompts, in a given order or in that of the plans."""
        if permutation is None:
            permutation = torch.from_numpy(np.stack([plan.order_T for plan in plans]))
        permutation = read_order(permutation, prompt, self.config.mask_token_id)
        # The tokens.
        sequences = prompt.clone()
        nfe = self._reveal(sequences, permutation, plans, choice)
        return Generation(
            sequences=sequences,
            permutation=permutation,
            schedule=join_schedules([plan.schedule for plan in plans]),
            nfe=nfe,
        )

    @abstractmethod
    def _plan(self, request: PlanRequest) -> RevealPlan:
        """Plan the generation of one sample."""

    @abstractmethod
    def _reveal(
        self,
        tokens_NT: Tensor,
        permutation_NT: Tensor,
        plans: list[RevealPlan],
        choice: TokenChoice,
    ) -> int:
        """Reveal the unknown tokens in place, and return the number of forward passes.

        Args:
            tokens_NT: Tokens in natural order, int64, with mask tokens where unknown; overwritten.
            permutation_NT: Order of generation, int64: `permutation[n, slot] = position`.
            plans: The plan of each sample.
            choice: Parameters by which tokens are chosen.
        """


def log_probabilities(logits: Tensor, targets: Tensor, mask_token_id: int) -> Tensor:
    """Return the natural logarithm of each target's probability, float64 `[B, T]`.

    Args:
        logits: `[B, T, V]`; the mask token gets the probability 0.
        targets: int64 `[B, T]`.
        mask_token_id: The mask token.
    """
    wide_BTV = logits.to(torch.float64)
    wide_BTV[:, :, mask_token_id] = -torch.inf
    return wide_BTV.log_softmax(dim=-1).gather(2, targets[:, :, None])[:, :, 0]
