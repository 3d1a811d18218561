"""The table of objectives: a new objective is a file beside this one and a line here."""

from megatron_eso.config.sections import ObjectiveConfig
from megatron_eso.objectives.eso_lm import EsoLmObjective
from megatron_eso.objectives.objective import Objective

OBJECTIVES = {
    "eso_lm": EsoLmObjective,
}


def build_objective(config: ObjectiveConfig, *, seed: int, mask_token_id: int) -> Objective:
    """Build the objective that `objective.name` names.

    Args:
        config: The section `objective`.
        seed: The run's seed, key of everything that the objective draws.
        mask_token_id: Token of masked slots.
    """
    return OBJECTIVES[config.name].from_config(config, seed=seed, mask_token_id=mask_token_id)
