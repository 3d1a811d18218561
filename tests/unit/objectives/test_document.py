"""The figures of docs/objectives.md: FLOPs and losses at step 0 of every objective."""

import math
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from megatron_eso.batches.dealing import count_tokens
from megatron_eso.batches.loss import normalize_phases, sum_phases
from megatron_eso.config.layers import SHIPPED_CONFIGS
from megatron_eso.config.loading import load_config
from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.config.sections import Vocabulary
from megatron_eso.estimates.flops import training_flops_per_token
from megatron_eso.objectives.build import OBJECTIVES, build_objective
from megatron_eso.objectives.objective import Objective, Samples, Step

DOCUMENT = Path(__file__).parents[3] / "docs" / "objectives.md"
VOCAB_SIZE, LENGTH = 50258, 1024
BATCH_SIZE, NUM_STEPS = 64, 24


class Line(NamedTuple):
    """A line of the table: keys of the section, relative FLOPs, factor and loss at step 0."""

    keys: dict[str, Any]
    flops: float
    factor: float
    loss: float


def read_table() -> list[Line]:
    lines = []
    for text in DOCUMENT.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in text.strip("|").split("|")]
        if text.startswith("| `name = ") and len(cells) == 4:
            keys = tomllib.loads(f"keys = {{{cells[0].strip('`')}}}")["keys"]
            lines.append(Line(keys, *map(float, cells[1:])))
    return lines


def build(keys: dict[str, Any]) -> Objective:
    clip = {"clip": tuple(keys["clip"])} if "clip" in keys else {}
    vocabulary = Vocabulary(size=VOCAB_SIZE, mask_token_id=VOCAB_SIZE - 1)
    return build_objective(ObjectiveConfig(**keys | clip), vocabulary, seed=1)


TABLE = read_table()


def test_every_objective_has_a_line() -> None:
    assert {line.keys["name"] for line in TABLE} == set(OBJECTIVES)
    assert {line.keys.get("variant") for line in TABLE} == {None, "a", "b"}


@pytest.mark.parametrize("line", TABLE, ids=lambda line: str(line.keys))
def test_flops_are_those_of_the_code(line: Line) -> None:
    model = load_config(["owt_small.toml"], folder=SHIPPED_CONFIGS).config.model
    flops, ar_flops = (
        training_flops_per_token(model, VOCAB_SIZE, build(keys), LENGTH)
        for keys in (line.keys, {"name": "ar"})
    )
    assert round(flops / ar_flops, 3) == line.flops
    assert round(ar_flops / 1e6) == 798


@pytest.mark.parametrize("line", TABLE, ids=lambda line: str(line.keys))
def test_the_first_loss_is_that_of_uniform_predictions(line: Line) -> None:
    assert math.isclose(line.loss, line.factor * math.log(VOCAB_SIZE - 1), abs_tol=6e-3)
    # The factors of several steps: the loss where each predicted token has a loss of 1.
    objective = build(line.keys)
    factors = [plan_factor(objective, number) for number in range(NUM_STEPS)]
    # Five standard errors, and the rounding of the table. Without random weights both are equal.
    error = float(np.std(factors, ddof=1)) / math.sqrt(NUM_STEPS)
    print(f"{line.keys}: {np.mean(factors):.4f} +- {error:.4f}")
    assert abs(np.mean(factors) - line.factor) < 5 * error + 6e-4
    assert error < 0.02


def plan_factor(objective: Objective, number: int) -> float:
    """Return the loss of a step in which each predicted token has a loss of 1."""
    length = 64
    first_index = number * BATCH_SIZE
    samples = Samples(
        tokens_BT=np.ones((BATCH_SIZE, length), dtype=np.int64),
        indices_B=first_index + np.arange(BATCH_SIZE),
        length_B=np.full(BATCH_SIZE, length),
    )
    step = Step(number=number, first_index=first_index, batch_size=BATCH_SIZE)
    loss = objective.plan(samples, step).loss
    ones_E = torch.ones(loss.num_real, dtype=torch.float64)
    num_phases = len(objective.phases)
    sums_P = sum_phases(ones_E, loss.weights_E[: loss.num_real].double(), loss, num_phases)
    targets_B = objective.count_targets(samples.length_B)
    tokens = count_tokens(targets_B, objective.assign_phases(step), num_phases)
    return objective.combine(normalize_phases(sums_P, tokens)).item()
