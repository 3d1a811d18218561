"""The table of objectives; a new objective is a file in this folder and a line here."""

from collections.abc import Callable

from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.config.sections import Vocabulary
from megatron_eso.objectives.any_order_ar import AnyOrderArObjective
from megatron_eso.objectives.ar import ArObjective
from megatron_eso.objectives.bd3_lm import Bd3LmObjective
from megatron_eso.objectives.eso_lm import EsoLmObjective
from megatron_eso.objectives.mdlm import MdlmObjective
from megatron_eso.objectives.objective import Objective
from megatron_eso.objectives.set_dlm import SetDlmObjective
from megatron_eso.objectives.warm_start import WarmStart

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "eso_lm": EsoLmObjective.from_config,
    "mdlm": MdlmObjective.from_config,
    "ar": ArObjective.from_config,
    "bd3_lm": Bd3LmObjective.from_config,
    "set_dlm": SetDlmObjective.from_config,
    "any_order_ar": AnyOrderArObjective.from_config,
}


def build_objective(config: ObjectiveConfig, vocabulary: Vocabulary, *, seed: int) -> Objective:
    """Build the objective that `objective.name` names.

    Args:
        config: The section `objective`.
        vocabulary: The token ids; masked slots hold its mask token.
        seed: The run's seed, from which the objective draws everything random.

    Returns:
        The objective.

    Raises:
        ConfigError: The vocabulary lacks a token that the objective needs.
    """
    objective = OBJECTIVES[config.name](config, vocabulary, seed=seed)
    if config.warm_start_steps == 0:
        return objective
    mask_token_id = vocabulary.mask_token_id
    return WarmStart(
        objective=objective,
        ar=ArObjective(mask_token_id=mask_token_id, first_token=mask_token_id),
        num_steps=config.warm_start_steps,
    )
