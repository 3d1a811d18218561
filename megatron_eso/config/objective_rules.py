"""The rules for combinations of keys of the section `objective`."""

import json
from typing import Any

from megatron_eso.config.divisibility import list_divisors
from megatron_eso.config.keys import describe_keys
from megatron_eso.config.objective import has_staggered_order
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
    check_sequential_prediction(traced)
    check_order(traced)
    check_blocks(traced)
    traced.require(
        objective.prepend_token != "none" or not traced.config.data.document_attention,
        "objective.prepend_token",
        "leaves the first token of each document without a prediction under "
        'data.document_attention = true; use "mask" or "bos"',
    )
    traced.require(
        objective.name != "ar" or objective.warm_start_steps == 0,
        "objective.warm_start_steps",
        'objective.name = "ar" trains next-token prediction from the start; leave it out',
    )


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


def check_sequential_prediction(traced: TracedConfig) -> None:
    """Refuse next-token rows without a left-to-right order, and a rise of alpha_0 to 0 or 1."""
    objective = traced.config.objective
    if objective.sequential_prediction == "next":
        key = "objective.sequential_prediction"
        traced.require(
            objective.variant == "b", key, 'needs objective.variant = "b"; set that, or use "own"'
        )
        traced.require(
            objective.order == "left_to_right",
            key,
            'needs objective.order = "left_to_right", in which tokens follow each other; leave '
            "objective.order out",
        )
    traced.require(
        objective.alpha_0_warmup_steps == 0 or 0 < objective.alpha_0 < 1,
        "objective.alpha_0_warmup_steps",
        f"needs both phases, but objective.alpha_0 = {json.dumps(objective.alpha_0)} has one; "
        "leave it out",
    )


def check_order(traced: TracedConfig) -> None:
    """Refuse sizes of sets that no staggered order has."""
    objective, length = traced.config.objective, traced.config.data.sequence_length
    if objective.order != "staggered":
        default = type(objective)(name=objective.name, set_size=objective.set_size)
        for name in ("set_size", "max_set_size"):
            traced.require(
                getattr(objective, name) == getattr(default, name)
                and objective.set_size == type(objective)().set_size,
                f"objective.{name}",
                f"objective.order = {json.dumps(objective.order)} has no sets; leave it out",
            )
        return
    size, largest = objective.set_size, objective.max_set_size
    traced.require(
        size <= length,
        "objective.set_size",
        f"is more than data.sequence_length = {length}; use at most {length}",
    )
    traced.require(
        has_staggered_order(size, largest, length),
        "objective.max_set_size",
        f"is too small for objective.set_size = {size}; use {2 * size}",
    )


def check_blocks(traced: TracedConfig) -> None:
    """Refuse blocks that do not divide a sample, and clips that no number of masks lies in."""
    objective, length = traced.config.objective, traced.config.data.sequence_length
    if not objective.has_key("block_size"):
        return
    size = objective.block_size
    below = [divisor for divisor in list_divisors(length) if divisor <= size]
    traced.require(
        length % size == 0,
        "objective.block_size",
        f"does not divide data.sequence_length = {length}; use {below[-1]}",
    )
    clip = objective.clip
    if clip is None:
        return
    traced.require(
        len(clip) == 2 and 0 <= clip[0] <= clip[1] <= 1,
        "objective.clip",
        "must be two numbers, 0 <= low <= high <= 1; use [0.3, 0.8]",
    )
    traced.require(
        any(clip[0] <= number / size <= clip[1] for number in range(size + 1)),
        "objective.clip",
        f"holds no multiple of 1/{size}, the masked shares of a block; use a wider interval",
    )


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
