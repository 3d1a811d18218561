"""`AR`: the autoregressive model.

Shape suffixes: B samples, T positions, V vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from ..steps.choice import TokenChoice
from ..steps.next_tokens import reveal_next_tokens
from ..steps.ordering import RevealPlan
from .model import PlanRequest, SamplerModel, log_probabilities


class AR(SamplerModel):
    """An autoregressive model on one device.

    `prepend_token` in `config.json` says what predicts the first token. With `mask` or `bos` a row
    with that token comes before the text: the rows are `[prepended, x_0 .. x_{T-1}]`, the row
    number is the position for the rotary angles (token i has i + 1), and row i predicts token i.
    With `none` token i has the position i, row i predicts token i + 1, and the first token has no
    distribution. Training has the rows `[prepended, x_0 .. x_{T-2}]` at the positions 0 .. T-1,
    with the targets `x_0 .. x_{T-1}`; with `none` the row of the first target is left out. It gives
    rows the positions of their targets in both cases, which is the same network, since rotary
    angles are relative. Source: `AR._process_model_input` in `algo.py` of
    github.com/s-sahoo/Eso-LMs.
    """

    objective = "ar"
    has_exact_likelihood = True

    @property
    def prepended(self) -> int | None:
        """The token before the text; None: there is none."""
        kind = self.description["prepend_token"]
        if kind == "none":
            return None
        return int(
            self.config.mask_token_id if kind == "mask" else self.description["bos_token_id"]
        )

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Compute the logits of the next tokens.

        Args:
            tokens: Text in natural order, int64 `[B, T]`.

        Returns:
            `[B, T, V]`, of which row i predicts token i + 1; the mask token's column is not masked.

        Raises:
            ValueError: `T > max_length`, or a shape, dtype or token is wrong.
        """
        logits_BRV = self.network.next_token_logits(tokens, self.prepended)
        return logits_BRV[:, -tokens.shape[1] :]

    @torch.no_grad()
    def token_log_likelihoods(self, x_0: Tensor) -> Tensor:
        """Compute log p(token | the tokens before it), in natural order.

        Args:
            x_0: Text in natural order, int64 `[B, T]`; the mask token has probability 0.

        Returns:
            Natural logarithms, float64 `[B, T]`; with `prepend_token` `none` the first token has no
            distribution, and the result is `[B, T - 1]`.

        Raises:
            ValueError: `T > max_length`, or a shape, dtype or token is wrong.
        """
        logits_BRV = self.network.next_token_logits(x_0, self.prepended)[:, :-1]
        targets = x_0[:, x_0.shape[1] - logits_BRV.shape[1] :]
        return log_probabilities(logits_BRV, targets, self.config.mask_token_id)

    def log_likelihood(self, x_0: Tensor) -> Tensor:
        """Compute the exact log-likelihood of each text, float64 `[B]`.

        Arguments and errors are those of `token_log_likelihoods`.
        """
        return self.token_log_likelihoods(x_0).sum(dim=1)

    def score_left_to_right(self, x_0: Tensor) -> Tensor:
        """Compute `token_log_likelihoods`."""
        return self.token_log_likelihoods(x_0)

    def _plan(self, request: PlanRequest) -> RevealPlan:
        num_positions, num_known = len(request.is_known_T), int(request.is_known_T.sum())
        if not request.is_known_T[:num_known].all():
            raise ValueError(
                f"prompt of sample {request.row}: its known tokens are not a prefix; an AR model "
                "cannot fill in a gap"
            )
        if self.prepended is None and num_known == 0:
            raise ValueError(
                f"prompt of sample {request.row} is empty, and the model has no prepended token "
                "(prepend_token = none); give a prompt with the first token"
            )
        if request.steps is not None:
            raise ValueError("steps: an AR model reveals one token in each step")
        schedule = [1] * (num_positions - num_known)
        if request.schedule not in (None, schedule):
            raise ValueError("schedule: an AR model reveals one token in each step")
        return RevealPlan(schedule=schedule, order_T=np.arange(num_positions))

    def _reveal(
        self,
        tokens_NT: Tensor,
        permutation_NT: Tensor,
        plans: list[RevealPlan],
        choice: TokenChoice,
    ) -> int:
        if bool((permutation_NT.diff(dim=1) < 0).any()):
            raise ValueError("permutation: an AR model generates left to right")
        known_N = (tokens_NT != self.config.mask_token_id).sum(1).cpu().numpy()
        return reveal_next_tokens(self.network, tokens_NT, known_N, choice, self.prepended)
