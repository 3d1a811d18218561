"""Every key: its range, its policy on resume, its objectives, and its errors."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Interval, Le, Lt

from megatron_eso.config.combinations import check_config
from megatron_eso.config.keys import (
    Frozen,
    Key,
    Logged,
    Only,
    describe_interval,
    describe_keys,
    is_inside,
    read_interval,
)
from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.config.objective_rules import check_objective_keys, find_foreign_keys
from megatron_eso.config.origins import TracedConfig
from megatron_eso.config.sections import KEYS, Config
from megatron_eso.errors import ConfigError
from tests.support.configs import make_config, replace_value

# Ranges, stated here independently of the sections: legal numbers, and the text of the error.
POSITIVE = [
    "model.num_layers",
    "model.hidden_size",
    "model.num_attention_heads",
    "model.kv_channels",
    "model.num_query_groups",
    "model.ffn_hidden_size",
    "model.norm_epsilon",
    "model.rotary_base",
    "model.rope_low_freq_factor",
    "model.rope_high_freq_factor",
    "model.rope_original_length",
    "model.init_method_std",
    "model.make_vocab_size_divisible_by",
    "data.sequence_length",
    "data.vocab_size",
    "data.phase",
    "data.cache_gib",
    "train.num_steps",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.log_interval",
    "validation.micro_batch_size",
    "optimizer.learning_rate",
    "optimizer.adam_eps",
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "checkpoint.keep_last",
    "objective.set_size",
    "objective.max_set_size",
    "objective.block_size",
]
NOT_NEGATIVE = [
    "run.seed",
    "objective.alpha_0_warmup_steps",
    "objective.warm_start_steps",
    "data.mask_token_id",
    "data.bos_token_id",
    "data.prefetch_steps",
    "data.batch_check_interval",
    "validation.interval",
    "validation.num_samples",
    "optimizer.min_learning_rate",
    "optimizer.lr_warmup_steps",
    "optimizer.lr_wsd_decay_steps",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "train.spike_deviations",
    "train.skip_deviations",
    "train.max_skipped_in_row",
    "train.max_rollbacks",
    "watchdog.start_seconds",
    "watchdog.step_seconds",
    "watchdog.validation_seconds",
    "watchdog.checkpoint_seconds",
    "checkpoint.end_margin_minutes",
    "checkpoint.interval",
    "checkpoint.interval_minutes",
    "checkpoint.keep_every",
]
FROM_0_BELOW_1 = [
    "data.ssl_ratio",
    "objective.sampling_eps",
    "model.hidden_dropout",
    "optimizer.adam_beta1",
    "optimizer.adam_beta2",
    "optimizer.ema_decay",
]
FROM_0_TO_1 = ["objective.alpha_0", "objective.batch_split"]
FROM_2 = ["parallel.virtual_pipeline_model_parallel_size"]
RANGES = [
    *((key, "greater than 0", (0, -1), (1, 7)) for key in POSITIVE),
    *((key, "0 or greater", (-1, -2), (0, 7)) for key in NOT_NEGATIVE),
    *((key, "at least 0 and below 1", (-0.1, 1, 1.5), (0, 0.5)) for key in FROM_0_BELOW_1),
    *((key, "between 0 and 1", (-0.1, 1.1), (0, 0.5, 1)) for key in FROM_0_TO_1),
    *((key, "2 or greater", (1, 0, -1), (2, 7)) for key in FROM_2),
    ("model.rope_scaling_factor", "1 or greater", (0.5, 0, -1), (1, 7)),
]
# Paths, URLs, names and lists: a rule checks them, or the code that uses them.
FREE = [
    "objective.clip",
    "run.directory",
    "run.wandb_project",
    "data.train",
    "data.train_weights",
    "data.validation",
    "data.quarantine",
    "data.cache_directory",
    "parallel.pipeline_model_parallel_layout",
    "checkpoint.init_from",
]

# Policies, by the first characters of their keys.
WEIGHTS_KEYS = ("model.", "data.vocab_size", "data.mask_token_id")
RUN_KEYS = ("model.", "run.seed", "data.sequence_length", "data.framing")
FREE_MODEL_KEYS = (
    "model.hidden_dropout",
    "model.init_method_std",
    "model.zero_init_head",
    "model.fp32_residual_connection",
)
FREE_WEIGHTS_KEYS = (*FREE_MODEL_KEYS, "model.rotary_base", "model.rope_")
INITIAL_KEYS = ("model.", "objective.", "data.sequence_length", "data.framing")
OBJECTIVE_KEYS = (
    "objective.name",
    "objective.variant",
    "objective.block_size",
    "objective.prepend_token",
    "objective.sequential_prediction",
)


def is_closed(key: Key) -> bool:
    return bool(key.choices) or key.accepted_types == (bool,)


def test_every_key_has_a_range_or_a_closed_type_or_is_free() -> None:
    ranged = [key for key, *_ in RANGES]
    assert len(set(ranged)) == len(ranged)
    assert {path for path, key in KEYS.items() if key.interval != Interval()} == set(ranged)
    assert {
        path for path, key in KEYS.items() if key.interval == Interval() and not is_closed(key)
    } == set(FREE)


@pytest.mark.parametrize(("path", "words", "outside", "inside"), RANGES)
def test_a_number_outside_its_range_is_refused(
    path: str, words: str, outside: tuple[float, ...], inside: tuple[float, ...]
) -> None:
    for number in outside:
        with pytest.raises(ConfigError) as raised:
            check_config(replace_value(make_config(), path, number), {path: "some.toml"})
        line = f"some.toml: {path} = {number}: must be {words}"
        assert str(raised.value) in (line, f"{line}, or leave it out")
    assert all(is_inside(number, KEYS[path].interval) for number in inside)


@pytest.mark.parametrize(
    ("markers", "words"),
    [
        ((Ge(0), Lt(3)), "at least 0 and below 3"),
        ((Gt(0), Le(3)), "greater than 0 and at most 3"),
        ((Lt(3),), "below 3"),
        ((Le(3),), "at most 3"),
        ((Interval(gt=0, lt=3), Frozen()), "greater than 0 and below 3"),
        ((Logged(),), ""),
    ],
)
def test_any_bounds_are_put_in_words(markers: tuple[Any, ...], words: str) -> None:
    interval = read_interval(markers)
    assert describe_interval(interval) == words
    assert is_inside(1, interval)
    assert is_inside(3, interval) == (interval.lt is None)
    assert is_inside(0, interval) == (interval.gt is None)


@pytest.mark.parametrize("path", KEYS)
def test_the_policy_of_every_key_is_the_one_written_down(path: str) -> None:
    key = KEYS[path]
    in_run = path.startswith(RUN_KEYS) and path not in FREE_MODEL_KEYS
    of_weights = path.startswith(WEIGHTS_KEYS) and not path.startswith(FREE_WEIGHTS_KEYS)
    assert key.is_frozen("run") == (in_run or path in OBJECTIVE_KEYS)
    assert key.is_frozen("weights") == of_weights
    if not of_weights:
        assert key.is_logged == path.startswith(INITIAL_KEYS)


def test_no_other_key_is_marked() -> None:
    """Check that every prefix in this file belongs to a key of the sections."""
    for prefix in (*WEIGHTS_KEYS, *RUN_KEYS, *FREE_WEIGHTS_KEYS, *INITIAL_KEYS, *OBJECTIVE_KEYS):
        assert any(path.startswith(prefix) for path in KEYS), prefix


def test_a_key_says_what_its_line_says() -> None:
    key = KEYS["model.rotary_base"]
    assert (key.name, key.default, key.type) == ("rotary_base", 10000, int)
    assert (key.is_required, key.is_optional, key.is_derived) == (False, False, False)
    assert KEYS["model.num_layers"].is_required
    assert KEYS["data.vocab_size"].is_optional
    assert KEYS["data.vocab_size"].accepted_types == (int,)
    assert KEYS["objective.batch_split"].is_derived
    assert KEYS["train.precision"].choices == ("fp32", "bf16")
    assert {path for path, key in KEYS.items() if key.is_derived} == {
        "objective.batch_split",
        "objective.order",
        "objective.max_set_size",
        "model.kv_channels",
        "model.num_query_groups",
        "model.ffn_hidden_size",
        "validation.micro_batch_size",
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class TwoObjectives:
    """A section of two objectives, each with its own keys."""

    name: Annotated[Literal["first", "second"], Frozen("run")] = "first"
    alpha_0: Annotated[float, Only("first")] = 0.25
    order: Annotated[str, Only("second")] = "uniform"
    eps: Annotated[float, Only("first", "second")] = 0.0
    loss: str = "elbo"


@pytest.mark.parametrize(
    ("section", "foreign"),
    [
        (TwoObjectives(), []),
        (TwoObjectives(alpha_0=0.5, eps=1.0, loss="low_var"), []),
        (TwoObjectives(name="second", order="left_to_right", eps=1.0, loss="low_var"), []),
        (TwoObjectives(name="second", alpha_0=0.25), []),
        (TwoObjectives(name="second", alpha_0=0.5), ["alpha_0"]),
        (TwoObjectives(name="first", alpha_0=0.5, order="left_to_right"), ["order"]),
    ],
)
def test_keys_of_other_objectives_are_found(section: TwoObjectives, foreign: list[str]) -> None:
    assert find_foreign_keys(section) == foreign


def test_a_key_of_another_objective_is_refused_in_one_line() -> None:
    section: Any = TwoObjectives(name="second", alpha_0=0.5)
    config = dataclasses.replace(make_config(), objective=section)
    traced = TracedConfig(config=config, origins={"objective.alpha_0": "command line"})
    with pytest.raises(ConfigError) as raised:
        check_objective_keys(traced)
    assert str(raised.value) == (
        'command line: objective.alpha_0 = 0.5: objective.name = "second" has no such key; '
        "leave it out, or set its default"
    )


def test_the_keys_of_eso_lm_are_its_own() -> None:
    own = {
        key.name
        for key in describe_keys("objective", ObjectiveConfig)
        if "eso_lm" in key.objectives
    }
    ordered = {"order", "set_size", "max_set_size"}
    eso_lm = {"variant", "alpha_0", "alpha_0_warmup_steps", "batch_split", "sequential_prediction"}
    assert own == eso_lm | {"loss_type", "sampling_eps"} | ordered


def test_every_section_is_in_the_table_of_keys() -> None:
    fields = {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(Config)
        for field in dataclasses.fields(getattr(make_config(), section.name))
    }
    assert set(KEYS) == fields
