"""The memory that the dry run states for the shipped configurations, against the simulator's."""

from unittest import mock

import pytest

from megatron_eso.config.sections import Config
from megatron_eso.estimates.activations import RowBytes
from megatron_eso.estimates.gpus import GPUS
from megatron_eso.estimates.memory import estimate_stages
from megatron_eso.simulation.micro_batches import find_largest, plan_kinds
from megatron_eso.simulation.stage import build_rank
from tests.support.planning import objective_of
from tests.support.shipped import BASE, MODELS, load_shipped

TOLERANCE = 0.05
WORLD_SIZE = 64
# What a formula counts for a layer, it counts for every layer.
FEW_LAYERS = "model.num_layers=4"
# Base's own values of these keys belong to Eso-LM.
OTHERS = ("objective.alpha_0=0.125", "objective.loss_type=elbo")
CELLS = {
    **{name: (*layers, "scale/64.toml") for name, layers in MODELS.items()},
    "hybrid": (*BASE, "objective.alpha_0=0.125"),
    "recomputed": (*BASE, "objective.alpha_0=0.125", "train.recompute_granularity=full"),
    **{
        name: (*BASE, f"objective.name={name}", *OTHERS)
        for name in ("any_order_ar", "set_dlm", "ar", "mdlm", "bd3_lm")
    },
    "next-token rows": (
        *BASE,
        "objective.alpha_0=0.125",
        "objective.sequential_prediction=next",
    ),
    "variant a": (*BASE, "objective.variant=a", "objective.alpha_0=0.125"),
    "swiglu": (
        *BASE,
        "model.activation=swiglu",
        "model.normalization=RMSNorm",
        "model.qk_layernorm=true",
        "model.hidden_size=2048",
        "model.num_attention_heads=16",
        "model.num_query_groups=4",
        "model.hidden_dropout=0.1",
    ),
    "wide heads": (
        *BASE,
        "model.hidden_size=1024",
        "model.num_attention_heads=16",
        "model.kv_channels=128",
        "model.num_query_groups=8",
        "model.qk_layernorm=true",
        "model.add_bias_linear=false",
        "model.add_qkv_bias=true",
        "model.rope_scaling=true",
    ),
}


def simulate_peak(config: Config, stage: int) -> int:
    kinds = plan_kinds(config, WORLD_SIZE // config.parallel.model_parallel_size)
    with build_rank(config, GPUS["h100"], WORLD_SIZE, stage, kinds) as rank:
        rank.take_step(find_largest(kinds), rank.num_largest)
        return sum(rank.recorder.memory.peak.values())


def estimate_peak(config: Config, stage: int) -> int:
    ranks = WORLD_SIZE // config.parallel.model_parallel_size
    return estimate_stages(config, config.data.vocabulary.size, objective_of(config), ranks)[
        stage
    ].total


@pytest.mark.parametrize("layers", CELLS.values(), ids=CELLS.keys())
def test_the_dry_run_states_the_simulated_peak(layers: tuple[str, ...]) -> None:
    config = load_shipped(*layers, FEW_LAYERS)
    for stage in sorted({0, config.parallel.pipeline_model_parallel_size - 1}):
        estimated, simulated = estimate_peak(config, stage), simulate_peak(config, stage)
        print(f"stage {stage}: {estimated / 2**30:.3f} GiB, simulated {simulated / 2**30:.3f}")
        assert estimated == pytest.approx(simulated, rel=TOLERANCE)


@pytest.fixture(scope="module")
def eight_layers() -> tuple[Config, int]:
    config = load_shipped(*BASE, "train.micro_batch_size=8", "model.num_layers=8")
    return config, simulate_peak(config, 0)


@pytest.mark.parametrize("forgotten", ["branch", "queries", "norm", "logit"])
def test_a_formula_that_forgets_something_is_found(
    eight_layers: tuple[Config, int], forgotten: str
) -> None:
    config, simulated = eight_layers
    right = RowBytes.of(config)
    wrong = {name: getattr(right, name) for name in RowBytes.__slots__} | {forgotten: 0.0}
    assert estimate_peak(config, 0) == pytest.approx(simulated, rel=TOLERANCE)
    with mock.patch.object(RowBytes, "of", return_value=RowBytes(**wrong)):
        assert estimate_peak(config, 0) < (1 - TOLERANCE) * simulated
