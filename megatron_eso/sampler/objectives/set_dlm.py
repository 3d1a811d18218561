"""`SetDLM`: the model of Set Diffusion; arXiv 2607.01775."""

from ..steps.ordering import RevealPlan, plan_sets
from .model import PlanRequest
from .slot_model import SlotModel


class SetDLM(SlotModel):
    """A Set Diffusion model on one device.

    Each token is predicted from the tokens of the sets before its own. A set has the tokens whose
    hitting times fall into one of `steps` equal intervals of [0, 1]; by default, and without
    `steps`, each token is a set, and the samples have exactly the likelihood that
    `token_log_likelihoods` computes.
    """

    objective = "set_dlm"

    def _plan(self, request: PlanRequest) -> RevealPlan:
        plan = plan_sets(request.seed, request.row, request.is_known_T, self.law, request.steps)
        if request.schedule is None:
            return plan
        return RevealPlan(schedule=request.schedule, order_T=plan.order_T)
