"""Whether a run fits a GPU, what to change first where it does not, and proposed layouts."""

import pytest

from megatron_eso.config.combinations import check_layout
from megatron_eso.config.layers import SHIPPED_CONFIGS
from megatron_eso.config.loading import load_config
from megatron_eso.config.sections import Config
from megatron_eso.errors import ConfigError
from megatron_eso.estimates.dry_run import check_fit, format_dry_run
from megatron_eso.estimates.fit import find_cure, measure_fit
from megatron_eso.estimates.gpus import GPUS
from megatron_eso.estimates.planner import format_plan, plan_layout
from tests.support.planning import objective_of
from tests.support.shipped import BASE, MODELS, load_shipped

H100 = GPUS["h100"]
TOO_LARGE = (*BASE, "objective.alpha_0=0.125", "train.micro_batch_size=8")


@pytest.mark.parametrize("world_size", [8, 64, 128, 1024])
@pytest.mark.parametrize("layers", MODELS.values(), ids=MODELS.keys())
def test_scale_layers_are_dealt_and_fit(layers: tuple[str, ...], world_size: int) -> None:
    loaded = load_config(
        [*layers, f"scale/{world_size}.toml", "data.vocab_size=32001"], folder=SHIPPED_CONFIGS
    )
    text = format_dry_run(loaded, world_size, H100)
    assert f"\n# layout: {world_size} ranks = " in text
    assert "\n# fits: " in text
    assert f"hours on {world_size} h100" in text


def test_a_run_that_does_not_fit_is_refused_with_the_first_cure() -> None:
    config = load_shipped(*TOO_LARGE)
    with pytest.raises(ConfigError, match=r"does not fit h100: .* set train.micro_batch_size=4$"):
        check_fit(config, 64, H100)
    check_fit(load_shipped(*TOO_LARGE, "train.micro_batch_size=4"), 64, H100)


def test_cures_come_in_the_order_of_their_price() -> None:
    def cure(*overrides: str, world_size: int = 64) -> str | None:
        config = load_shipped(*BASE, *overrides)
        return find_cure(config, objective_of(config), world_size, H100)

    wide = ("model.hidden_size=4096", "model.num_attention_heads=32")
    whole = ("parallel.use_distributed_optimizer=false", "parallel.overlap_param_gather=false")
    assert cure(*wide, *whole, "train.micro_batch_size=1") == (
        "parallel.use_distributed_optimizer=true"
    )
    assert cure(*wide, "model.num_layers=40") == "train.micro_batch_size=1"
    assert cure(*wide, "model.num_layers=48") == "train.recompute_granularity=full"
    assert cure("model.num_layers=300") is None


def test_the_plan_of_a_large_model_splits_it_and_fits() -> None:
    config = load_shipped(
        *BASE,
        "model.num_layers=40",
        "model.hidden_size=5120",
        "model.num_attention_heads=40",
        "train.global_batch_size=2048",
    )
    plan = plan_layout(config, objective_of(config), 1024, H100)
    best = plan.candidates[0]
    assert best.config.parallel.model_parallel_size > 1 or best.config.train.micro_batch_size == 1
    for each in plan.candidates:
        check_layout(each.config, 1024)
        assert measure_fit(each.config, objective_of(config), 1024, H100).is_enough
    assert all(each.time.total >= best.time.total / 1.02 for each in plan.candidates)
    text = format_plan(plan, 1024, H100)
    assert text.startswith("plan for 1024 x h100, estimated from sizes: ")
    assert "\nnext:\n" in text


def test_a_plan_without_a_layout_says_so() -> None:
    config: Config = load_shipped(*BASE, "model.num_layers=400")
    plan = plan_layout(config, objective_of(config), 1, H100)
    assert plan.candidates == ()
    assert "no layout fits" in format_plan(plan, 1, H100)
