"""The table of objectives; a new objective is a file in this folder and a line here."""

from collections.abc import Callable

from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.objectives.any_order_ar import AnyOrderArObjective
from megatron_eso.objectives.eso_lm import EsoLmObjective
from megatron_eso.objectives.objective import Objective

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "eso_lm": EsoLmObjective.from_config,
    "any_order_ar": AnyOrderArObjective.from_config,
}


def build_objective(config: ObjectiveConfig, *, seed: int, mask_token_id: int) -> Objective:
    """Build the objective that `objective.name` names.

    Args:
        config: The section `objective`.
        seed: The run's seed, from which the objective draws everything random.
        mask_token_id: Token of masked slots.

    Returns:
        The objective.
    """
    build = OBJECTIVES[config.name]
    return build(config, seed=seed, mask_token_id=mask_token_id)
