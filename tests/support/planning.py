"""Objectives and micro-batches as tests want them: of given noise, with every setting by name."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eso.batches.rows import MicroBatch, Rows
from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.config.sections import Config, Vocabulary
from megatron_eso.objectives.build import build_objective
from megatron_eso.objectives.eso_lm import EsoLmObjective
from megatron_eso.objectives.noise.slots import Noise
from megatron_eso.objectives.objective import Objective, Samples, Step


def eso_lm(mask_token_id: int, *, seed: int = 1, **settings: Any) -> EsoLmObjective:
    """Build an Eso-LM objective from keys of the section `objective`."""
    objective = build_objective(
        ObjectiveConfig(**settings),
        Vocabulary(size=mask_token_id + 1, mask_token_id=mask_token_id),
        seed=seed,
    )
    assert isinstance(objective, EsoLmObjective)
    return objective


def objective_of(config: Config) -> Objective:
    """Build the objective of a configuration whose vocabulary is known."""
    return build_objective(config.objective, config.data.vocabulary, seed=config.run.seed)


FAMILY: dict[str, dict[str, Any]] = {
    "eso_lm": {"alpha_0": 0.5},
    "eso_lm a": {"alpha_0": 0.5, "variant": "a"},
    "eso_lm uniform": {"alpha_0": 0.3, "order": "uniform"},
    "eso_lm next": {"alpha_0": 0.4, "sequential_prediction": "next"},
    "mdlm": {"name": "mdlm"},
    "ar": {"name": "ar"},
    "ar none": {"name": "ar", "prepend_token": "none"},
    "bd3_lm": {"name": "bd3_lm", "block_size": 4},
    "set_dlm": {"name": "set_dlm", "set_size": 4},
    "any_order_ar": {"name": "any_order_ar"},
}
WARM: dict[str, Any] = {"warm_start_steps": 10}
"""Settings of the section `objective` that every test of the family runs with."""


def family_objective(name: str, mask_token_id: int, *, seed: int = 1, **more: Any) -> Objective:
    """Build an objective of `FAMILY`."""
    vocabulary = Vocabulary(size=mask_token_id + 1, mask_token_id=mask_token_id)
    return build_objective(ObjectiveConfig(**FAMILY[name], **more), vocabulary, seed=seed)


def family_rows(name: str, *, num_samples: int, length: int, row_multiple: int = 1) -> Rows:
    """Plan the rows of the first step of an objective of `FAMILY`."""
    objective = family_objective(name, 9)
    step = Step(number=0, first_index=0, batch_size=num_samples)
    samples = Samples.blank(num_samples, length, 9)
    return objective.plan(samples, step).pad(row_multiple, 9).rows


def plan_noise(
    objective: EsoLmObjective,
    x_0_BT: NDArray[np.int64],
    noise: Noise,
    *,
    row_multiple: int = 1,
    indices_B: NDArray[np.int64] | None = None,
) -> MicroBatch:
    """Plan a micro-batch of given texts and noise."""
    indices_B = np.arange(len(noise.length_B)) if indices_B is None else indices_B
    samples = Samples(tokens_BT=x_0_BT, indices_B=indices_B, length_B=noise.length_B)
    return objective.plan_noise(samples, noise).pad(row_multiple, objective.mask_token_id)
