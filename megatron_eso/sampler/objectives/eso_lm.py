"""`EsoLM`: the models of both variants of Eso-LM; arXiv 2506.01928.

Shape suffixes: B and N samples, T slots, V vocabulary.
"""

import torch
from torch import Tensor

from ..steps.ordering import RevealPlan, count_random_slots, draw_order, plan_ancestral
from .model import PlanRequest
from .slot_model import SlotModel


class EsoLM(SlotModel):
    """An Eso-LM on one device.

    Variant B is causal over slots in both phases. In variant A the clean slots of the diffusion
    phase read each other both ways, and still do so in the sequential phase; so each step of the
    diffusion phase computes all its rows, and only the sequential phase has a cache.

    With `sequential_prediction` `next`, a step of the sequential phase that reveals one token
    computes the row of the token before it only, if the slot before has that token. Every other
    step has a mask for each token that it reveals.

    By default `generate` has the paper's ancestral schedule of T time steps, then one token at a
    time. The order is random up to `alpha_0 T` slots, then that of training, which is left to right
    by default.
    """

    objective = "eso_lm"
    by_sets = False

    @property
    def alpha_0(self) -> float:
        """The value with which the model was trained; the default of `generate`."""
        return float(self.description["alpha_0"])

    @property
    def has_two_way_prefix(self) -> bool:
        """Whether the model is of variant A."""
        return bool(self.description["variant"] == "a")

    @property
    def predicts_next(self) -> bool:
        """Whether rows of the sequential phase predict the next token where they can."""
        return bool(self.description["sequential_prediction"] == "next")

    @torch.no_grad()
    def diffusion_logits(self, z_t: Tensor, permutation: Tensor) -> Tensor:
        """Compute the logits of the diffusion phase; see `EsoNetworkMixin.diffusion_logits`."""
        return self.network.diffusion_logits(
            z_t, permutation, two_way_prefix=self.has_two_way_prefix
        )

    def _plan(self, request: PlanRequest) -> RevealPlan:
        num_slots, num_known = len(request.is_known_T), int(request.is_known_T.sum())
        alpha_0 = self.alpha_0 if request.alpha_0 is None else request.alpha_0
        if request.schedule is None:
            steps = num_slots if request.steps is None else request.steps
            schedule, num_random = plan_ancestral(
                request.seed, num_slots, num_known, alpha_0, steps
            )
        else:
            schedule = request.schedule
            num_random = count_random_slots(schedule, num_slots, num_known, alpha_0)
        order_T = draw_order(request.seed, request.row, request.is_known_T, num_random, self.law)
        return RevealPlan(schedule=schedule, order_T=order_T, num_random=num_random)
