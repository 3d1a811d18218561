"""`SlotModel`: an objective that generates slot after slot, with an exact likelihood.

Shape suffixes: N samples, T slots.
"""

import numpy as np
import torch
from torch import Tensor

from ...objectives.noise.orders import OrderLaw
from ..steps.choice import TokenChoice
from ..steps.ordering import RevealPlan
from ..steps.slots import SlotReading, reveal_slots
from .model import SamplerModel, log_probabilities


class SlotModel(SamplerModel):
    """A model whose tokens have a place in an order of generation."""

    has_exact_likelihood = True
    by_sets = True
    """Whether the masks of a step read only clean slots and themselves."""

    @property
    def has_two_way_prefix(self) -> bool:
        """Whether the clean slots at the beginning of a phase read each other both ways."""
        return False

    @property
    def predicts_next(self) -> bool:
        """Whether rows of the sequential phase predict the next token where they can."""
        return False

    @property
    def law(self) -> OrderLaw:
        """The distribution of orders."""
        return OrderLaw(
            name=self.description["order"],
            set_size=self.description.get("set_size") or 1,
            max_set_size=self.description.get("max_set_size") or 1,
        )

    @torch.no_grad()
    def sequential_logits(self, z_0: Tensor, x_0: Tensor, permutation: Tensor) -> Tensor:
        """Compute logits of masked slots, each from the slots before it.

        See `EsoNetworkMixin.sequential_logits` for arguments, result and errors.
        """
        return self.network.sequential_logits(
            z_0,
            x_0,
            permutation,
            two_way_prefix=self.has_two_way_prefix,
            predicts_next=self.predicts_next,
        )

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
        logits_BTV = self.network.sequential_logits(
            masked, x_0, permutation, predicts_next=self.predicts_next
        )
        return log_probabilities(logits_BTV, x_0.gather(1, permutation), self.config.mask_token_id)

    def log_likelihood(self, x_0: Tensor, permutation: Tensor) -> Tensor:
        """Compute the exact log-likelihood of each text in the given order, float64 `[B]`.

        Arguments and errors are those of `token_log_likelihoods`.
        """
        return self.token_log_likelihoods(x_0, permutation).sum(dim=1)

    def score_left_to_right(self, x_0: Tensor) -> Tensor:
        """Compute `token_log_likelihoods` in natural order."""
        order = torch.arange(x_0.shape[1], device=x_0.device).expand_as(x_0).contiguous()
        return self.token_log_likelihoods(x_0, order)

    def _reveal(
        self,
        tokens_NT: Tensor,
        permutation_NT: Tensor,
        plans: list[RevealPlan],
        choice: TokenChoice,
    ) -> int:
        slots_NT = tokens_NT.gather(1, permutation_NT)
        known_N = (slots_NT != self.config.mask_token_id).sum(1).cpu().numpy()
        random_N = np.array([plan.num_random for plan in plans])
        prefix_N = np.maximum(random_N, known_N) if self.has_two_way_prefix else 0 * known_N
        first_next_N = random_N if self.predicts_next else np.full_like(random_N, slots_NT.shape[1])
        nfe = reveal_slots(
            self.network,
            slots_NT,
            permutation_NT,
            [plan.schedule for plan in plans],
            choice,
            SlotReading(prefix_N=prefix_N, by_sets=self.by_sets, first_next_N=first_next_N),
        )
        tokens_NT.scatter_(1, permutation_NT, slots_NT)
        return nfe
