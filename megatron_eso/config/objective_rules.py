"""The rules for combinations of keys of the section `objective`."""

import json
from typing import Any

from megatron_eso.config.keys import describe_keys
from megatron_eso.config.origins import TracedConfig


def check_objective_keys(traced: TracedConfig) -> None:
    """Refuse keys of other objectives, and splits that this objective does not allow."""
    objective = traced.config.objective
    for name in find_foreign_keys(objective):
        traced.refuse(
            f"objective.{name}",
            f"objective.name = {json.dumps(objective.name)} has no such key; leave it out, or set "
            f"its default",
        )
    if objective.has_key("batch_split"):
        check_split(traced)


def find_foreign_keys(objective: Any) -> list[str]:
    """Return the keys of other objectives that do not have their defaults.

    Args:
        objective: An `ObjectiveConfig`, or a section of the same form.
    """
    default = type(objective)(name=objective.name)
    return [
        key.name
        for key in describe_keys("objective", type(objective))
        if not key.belongs_to(objective.name)
        and getattr(objective, key.name) != getattr(default, key.name)
    ]


def check_split(traced: TracedConfig) -> None:
    """Refuse a split of the samples that contradicts alpha_0."""
    alpha_0, split = traced.config.objective.alpha_0, traced.config.objective.batch_split
    key = "objective.batch_split"
    if alpha_0 in (0, 1):
        phase = "diffusion" if alpha_0 == 1 else "sequential"
        remedy = f"objective.alpha_0 = {json.dumps(alpha_0)} has the {phase} phase only"
        traced.require(
            split == alpha_0, key, f"{remedy}; use {json.dumps(alpha_0)} or leave it out"
        )
    else:
        remedy = f"objective.alpha_0 = {json.dumps(alpha_0)} needs both phases; use 0.5"
        traced.require(0 < split < 1, key, remedy)


def list_objective_warnings(traced: TracedConfig) -> list[str]:
    """List legal values that are known to train badly, one line each."""
    objective = traced.config.objective
    if not 0 < objective.batch_split < 0.5:
        return []
    origin = traced.find_origin("objective.batch_split")
    return [
        f"{origin}: objective.batch_split = {objective.batch_split}: training diverged below 0.5 "
        f"in the paper (arXiv 2506.01928, table 4)"
    ]
