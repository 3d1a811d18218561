"""Objectives and micro-batches as tests want them: of given noise, with every setting by name."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.config.sections import Config
from megatron_eso.objectives.build import build_objective
from megatron_eso.objectives.eso_lm import EsoLmObjective
from megatron_eso.objectives.noise import Noise
from megatron_eso.objectives.objective import Objective, Samples
from megatron_eso.objectives.rows import MicroBatch


def eso_lm(mask_token_id: int, *, seed: int = 1, **settings: Any) -> EsoLmObjective:
    """Build an Eso-LM objective from keys of the section `objective`."""
    objective = build_objective(ObjectiveConfig(**settings), seed=seed, mask_token_id=mask_token_id)
    assert isinstance(objective, EsoLmObjective)
    return objective


def objective_of(config: Config) -> Objective:
    """Build the objective of a configuration whose vocabulary is known."""
    mask_token_id = config.data.vocabulary.mask_token_id
    return build_objective(config.objective, seed=config.run.seed, mask_token_id=mask_token_id)


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
