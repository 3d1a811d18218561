"""The schedules of `pretrain.sensitivity`: their orders, their sets, and whom they refuse."""

import numpy as np
import pytest

from megatron_eso.batches.rows import MicroBatch
from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.config.sections import Vocabulary
from megatron_eso.errors import ConfigError
from megatron_eso.objectives.objective import Samples
from megatron_eso.sensitivity.schedules import check_objective, list_schedules

MASK, LENGTH, NUM_SAMPLES = 10, 20, 2
VOCABULARY = Vocabulary(size=11, mask_token_id=MASK, bos_token_id=None)


def plan_all(**settings: object) -> dict[tuple[str, int | None], MicroBatch]:
    """Plan samples under every schedule of an objective, by name and tokens of a step."""
    samples = Samples.blank(NUM_SAMPLES, LENGTH, MASK)
    schedules = list_schedules(
        ObjectiveConfig(**settings), VOCABULARY, length=LENGTH, num_samples=NUM_SAMPLES
    )
    return {(each.name, each.tokens_per_step): each.plan(samples) for each in schedules}


def order_of(batch: MicroBatch) -> list[list[int]]:
    rows = batch.rows
    found: list[list[int]] = rows.positions_R[rows.loss_rows_E].reshape(NUM_SAMPLES, -1).tolist()
    return found


def test_every_schedule_has_its_order() -> None:
    plans = plan_all(name="eso_lm")
    orders = {name: order_of(plan) for (name, size), plan in plans.items() if size == 1}
    natural = list(range(LENGTH))
    assert next(iter(orders)) == "trained"
    assert all(sorted(order) == natural for both in orders.values() for order in both)
    assert orders["left to right"] == [natural, natural]
    assert orders["right to left"] == [natural[::-1], natural[::-1]]
    assert orders["strided by 8"][0] == sorted(natural, key=lambda p: (p % 8, p))
    for order in orders["blocks of 4"]:
        assert [p // 4 for p in order] == [p // 4 for p in natural]
    assert orders["blocks of 4"][0] != orders["blocks of 4"][1] != natural
    assert orders["uniform"][0] != orders["uniform"][1]
    assert "staggered 8/16" in orders
    assert "blocks of 64" not in orders


def test_sets_have_2_4_8_tokens() -> None:
    plans = plan_all(name="eso_lm")
    several = [(name, size) for name, size in plans if size is not None and size > 1]
    by_two = [(name, size) for name in ("trained", "uniform") for size in (2, 4, 8, 16)]
    assert several == [*by_two, ("evenly spaced", 2), ("evenly spaced", 4)]
    order = np.array(order_of(plans["evenly spaced", 4])[0]).reshape(-1, 4)
    assert (np.diff(order) == 5).all()
    assert ("uniform", 2) not in plan_all(name="any_order_ar")


@pytest.mark.parametrize(("name", "num_keys"), [("eso_lm", [1, 2]), ("set_dlm", [1, 1])])
def test_masks_of_a_set_read_each_other_as_in_the_sampler(name: str, num_keys: list[int]) -> None:
    plan = plan_all(name=name)["trained", 2]
    reads_4E = plan.rows.reads_4R[:, plan.rows.loss_rows_E]
    assert reads_4E[1, :4].tolist() == [0, 0, 2, 2]
    assert reads_4E[3, :4].tolist() == num_keys * 2


def test_next_token_rows_predict_where_one_token_comes_at_a_time() -> None:
    own, plans = plan_all(name="eso_lm"), plan_all(name="eso_lm", sequential_prediction="next")
    assert plans["left to right", 1].rows.num_rows == NUM_SAMPLES * LENGTH
    for key, plan in plans.items():
        if key[0] == "right to left" or (key[1] or 0) > 1:
            assert plan.rows.spans == own[key].rows.spans


def test_nelbos_have_other_settings() -> None:
    nelbos = [name for name, size in plan_all(name="eso_lm", alpha_0=0.3) if size is None]
    assert nelbos == [f"NELBO, alpha_0 = {value}" for value in ("0.3", 0, 0.125, 0.25, 0.5, 1)]
    blocks = [name for name, _ in plan_all(name="bd3_lm", block_size=4)]
    assert blocks == [f"NELBO, block_size = {size}" for size in (4, 1, 2, 8, 16)]
    assert ("NELBO", None) in plan_all(name="set_dlm")


@pytest.mark.parametrize(("name", "what"), [("ar", "one order"), ("mdlm", "one NELBO")])
def test_an_objective_with_one_schedule_is_refused(name: str, what: str) -> None:
    with pytest.raises(ConfigError, match=f'config.json: objective.name = "{name}" has {what}'):
        check_objective(ObjectiveConfig(name=name), "config.json")
