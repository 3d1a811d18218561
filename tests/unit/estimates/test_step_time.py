"""The attention that the estimate of a step counts in tiles is what the rows of the plan say."""

import pytest

from megatron_eso.estimates.step_time import TILE_QUERIES, count_tiled
from megatron_eso.model import torch_attention
from tests.support.planning import WARM, family_objective

T, MASK = 512, 9
CAUSAL = T * (T + 1) / 2


def test_tiles_are_those_of_the_backend() -> None:
    assert TILE_QUERIES == torch_attention.TILE_QUERIES


@pytest.mark.parametrize("name", ["mdlm", "eso_lm", "eso_lm next"])
def test_steps_of_a_warm_up_are_not_counted(name: str) -> None:
    after = count_tiled(family_objective(name, MASK), T, MASK)
    more = {"alpha_0_warmup_steps": 10} if "eso_lm" in name else {}
    assert count_tiled(family_objective(name, MASK, **WARM, **more), T, MASK) == after


@pytest.mark.parametrize(
    ("name", "body", "last"),
    [
        ("ar", 0, 0),  # a causal stream in every layer
        ("mdlm", 0, T * T / 2),  # loss rows, half of all, read a stream that is not their own
        ("any_order_ar", CAUSAL, CAUSAL),  # queries in every layer
    ],
)
def test_pairs_outside_streams_are_counted(name: str, body: float, last: float) -> None:
    found = count_tiled(family_objective(name, MASK), T, MASK)
    assert [tiled.pairs for tiled in found] == pytest.approx([body, last], rel=0.01)
    assert all(tiled.scores >= tiled.pairs for tiled in found)
