"""`EsoLM`: the models of both variants of Eso-LM; arXiv 2506.01928.

Shape suffixes: B and N samples, T slots, V vocabulary.
"""

import secrets

import torch
from torch import Tensor

from ..steps.choice import TokenChoice
from ..steps.inputs import Generation, Schedule, read_prompt
from ..steps.ordering import RevealPlan, count_random_slots, draw_order, plan_ancestral
from .model import PlanRequest
from .slot_model import SlotModel


class EsoLM(SlotModel):
    """An Eso-LM on one device.

    Variant B is causal over slots in both phases. In variant A the clean slots of the diffusion
    phase read each other both ways, and still do so in the sequential phase; so each step of the
    diffusion phase computes all its rows, and only the sequential phase has a cache.
    """

    objective = "eso_lm"
    by_sets = False

    @property
    def alpha_0(self) -> float:
        """The value of training, which is the default of `generate`."""
        return float(self.description["alpha_0"])

    @property
    def has_two_way_prefix(self) -> bool:
        """Whether the model is of variant A."""
        return bool(self.description["variant"] == "a")

    @torch.no_grad()
    def diffusion_logits(self, z_t: Tensor, permutation: Tensor) -> Tensor:
        """Compute the logits of the diffusion phase; see `EsoNetworkMixin.diffusion_logits`."""
        return self.network.diffusion_logits(
            z_t, permutation, two_way_prefix=self.has_two_way_prefix
        )

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
        """Sample texts, or fill in prompts; see `SamplerModel.generate`.

        By default the schedule is the paper's ancestral one, then one token at a time; the order is
        random up to `alpha_0 T` slots, then that of training, which is left to right by default.

        Args:
            num_samples: As there.
            prompt: As there.
            schedule: As there.
            permutation: As there.
            gumbel: As there.
            length: As there.
            alpha_0: Share of the tokens that the diffusion phase reveals; default that of training.
            steps: Time steps of the ancestral schedule; default T.
            temperature: As there.
            top_p: As there.
            seed: As there.

        Raises:
            ValueError: As there.
        """
        prompt = read_prompt(self.network, num_samples, prompt, length)
        alpha_0 = self.alpha_0 if alpha_0 is None else alpha_0
        if not 0 <= alpha_0 <= 1:
            raise ValueError(f"alpha_0 is {alpha_0}, not in [0, 1]")
        choice = TokenChoice(
            temperature=temperature,
            top_p=top_p,
            seed=secrets.randbits(63) if seed is None else seed,
            gumbel=gumbel,
        )
        return self._generate(prompt, schedule, permutation, choice, steps=steps, alpha_0=alpha_0)

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
