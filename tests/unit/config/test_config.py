"""Derived values, and combinations that are refused."""

import dataclasses
from pathlib import Path

import pytest

from megatron_eso.config.combinations import check_config, check_layout, with_vocabulary
from megatron_eso.config.divisibility import check_dealing
from megatron_eso.config.loading import config_from_dict, config_to_dict, load_config
from megatron_eso.config.model import ModelConfig
from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.config.sections import ValidationConfig
from megatron_eso.errors import ConfigError
from tests.support.configs import make_config

BASE = """
[run]
directory = "runs/test"
[model]
num_layers = 4
hidden_size = 64
num_attention_heads = 4
[data]
train = "shards"
sequence_length = 16
[train]
num_steps = 10
global_batch_size = 16
micro_batch_size = 4
[optimizer]
learning_rate = 1e-3
"""


@pytest.fixture
def base(tmp_path: Path) -> str:
    path = tmp_path / "base.toml"
    path.write_text(BASE, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("alpha_0", "split"), [(0.0, 0.0), (0.125, 0.5), (1.0, 1.0)])
def test_batch_split_follows_alpha_0(alpha_0: float, split: float) -> None:
    assert ObjectiveConfig(alpha_0=alpha_0).batch_split == split


@pytest.mark.parametrize(
    ("activation", "hidden_size", "width"),
    [("gelu", 64, 256), ("swiglu", 192, 512), ("swiglu", 2176, 5824), ("swiglu", 64, 192)],
)
def test_mlp_width_follows_hidden_size(activation: str, hidden_size: int, width: int) -> None:
    model = ModelConfig(
        num_layers=1,
        hidden_size=hidden_size,
        num_attention_heads=4,
        activation=activation,  # type: ignore[arg-type]
    )
    assert model.ffn_hidden_size == width
    assert model.num_query_groups == 4


def test_validation_takes_the_micro_batch_of_training() -> None:
    assert make_config().validation.micro_batch_size == 4
    assert (
        make_config(validation=ValidationConfig(micro_batch_size=2)).validation.micro_batch_size
        == 2
    )


def test_the_vocabulary_is_padded_to_a_multiple_that_ignores_the_layout() -> None:
    model = make_config().model
    assert [model.pad_vocabulary(size) for size in (1, 128, 129, 50258)] == [128, 128, 256, 50304]


def test_a_config_survives_its_dictionary() -> None:
    config = make_config()
    assert config_from_dict(config_to_dict(config), "config.json") == config


def test_a_config_of_an_older_version_has_the_defaults_of_newer_keys() -> None:
    config, written = make_config(), config_to_dict(make_config())
    older = {"kv_channels", "add_qkv_bias", *(key for key in written["model"] if "rope_" in key)}
    model = {key: value for key, value in written["model"].items() if key not in older}
    assert len(model) == len(written["model"]) - 7
    assert config_from_dict(written | {"model": model}, "config.json") == config


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_config().run.seed = 2  # type: ignore[misc]


REFUSALS = [
    (["model.num_attention_heads=5"], "must divide model.hidden_size = 64; use 4 or 8"),
    (["model.num_attention_heads=5"], ", or set model.kv_channels"),
    (["model.num_attention_heads=64"], "num_attention_heads = 64: gives heads of 1 channels"),
    (["model.kv_channels=15"], "model.kv_channels = 15: gives heads of 15 channels; rotary"),
    (["model.add_qkv_bias=true"], "model.add_bias_linear = true has these biases and more"),
    (["model.rope_scaling_factor=4"], "needs model.rope_scaling = true; set it, or leave"),
    (["model.rope_original_length=4"], "needs model.rope_scaling = true; set it, or leave"),
    (
        ["model.rope_scaling=true", "model.rope_low_freq_factor=4"],
        "must be below model.rope_high_freq_factor = 4.0",
    ),
    (["model.num_query_groups=3"], "must divide model.num_attention_heads = 4; use 2 or 4"),
    (["parallel.tensor_model_parallel_size=8"], "must divide model.num_attention_heads = 4; use 4"),
    (
        ["parallel.tensor_model_parallel_size=4", "model.num_query_groups=2"],
        "must divide model.num_query_groups = 2",
    ),
    (
        ["parallel.tensor_model_parallel_size=2", "model.make_vocab_size_divisible_by=1"],
        "must divide model.make_vocab_size_divisible_by = 1",
    ),
    (["parallel.pipeline_model_parallel_size=3"], "must be a multiple of 3"),
    (
        ["parallel.virtual_pipeline_model_parallel_size=2"],
        "needs parallel.pipeline_model_parallel_size of 2 or more",
    ),
    (
        [
            "parallel.virtual_pipeline_model_parallel_size=2",
            "parallel.pipeline_model_parallel_size=2",
        ],
        "needs parallel.overlap_p2p_comm = true and parallel.batch_p2p_comm = false",
    ),
    (
        [
            "parallel.virtual_pipeline_model_parallel_size=3",
            "parallel.pipeline_model_parallel_size=2",
            "parallel.overlap_p2p_comm=true",
            "parallel.batch_p2p_comm=false",
        ],
        "must be a multiple of 6",
    ),
    (
        [
            "parallel.virtual_pipeline_model_parallel_size=2",
            "parallel.pipeline_model_parallel_size=2",
            "parallel.overlap_p2p_comm=true",
            "parallel.batch_p2p_comm=false",
            "train.global_batch_size=4",
        ],
        "an interleaved pipeline needs a multiple of its 2 stages; use a multiple of 8",
    ),
    (["parallel.overlap_p2p_comm=true"], "is for an interleaved pipeline"),
    (["parallel.sequence_parallel=true"], "needs parallel.tensor_model_parallel_size of 2 or more"),
    (["parallel.overlap_param_gather=true"], "needs parallel.use_distributed_optimizer = true"),
    (["train.global_batch_size=18"], "take a multiple of 4 (16 or 20)"),
    (["train.micro_batch_size=1", "train.global_batch_size=3"], "take a multiple of 2"),
    (["objective.batch_split=0.3"], "take a multiple of 40"),
    (["objective.alpha_0=1.5"], "must be between 0 and 1"),
    (["objective.alpha_0=1", "objective.batch_split=0.5"], "has the diffusion phase only; use 1"),
    (["objective.alpha_0=0", "objective.batch_split=0.5"], "has the sequential phase only; use 0"),
    (["objective.batch_split=1"], "needs both phases; use 0.5"),
    (["objective.set_size=4"], 'objective.order = "left_to_right" has no sets; leave it out'),
    (["objective.order=staggered", "objective.set_size=4000"], "is more than data.sequence_length"),
    (
        ["objective.order=staggered", "objective.set_size=8", "objective.max_set_size=2"],
        "is too small for objective.set_size = 8; use 16",
    ),
    (["objective.name=bd3_lm", "objective.block_size=7"], "does not divide data.sequence_length"),
    (
        ["objective.name=bd3_lm", "objective.block_size=4", "objective.clip=[0.3, 0.4]"],
        "holds no multiple of 1/4",
    ),
    (["objective.name=bd3_lm", "objective.clip=[0.8, 0.3]"], "must be two numbers"),
    (["objective.name=ar", "objective.warm_start_steps=5"], "trains next-token prediction from"),
    (
        ["objective.name=ar", "objective.prepend_token=none", "data.document_attention=true"],
        'use "mask" or "bos"',
    ),
    (
        ["objective.sequential_prediction=next", "objective.variant=a"],
        'needs objective.variant = "b"; set that, or use "own"',
    ),
    (
        ["objective.sequential_prediction=next", "objective.order=uniform"],
        'needs objective.order = "left_to_right"',
    ),
    (
        ["objective.alpha_0_warmup_steps=5", "objective.alpha_0=1"],
        "needs both phases, but objective.alpha_0 = 1.0 has one; leave it out",
    ),
    (["objective.name=gpt"], 'must be one of "eso_lm"'),
    (["objective.variant=c"], 'must be one of "a", "b"'),
    (
        ["model.zero_init_head=true", "model.share_embeddings_and_output_weights=true"],
        "must not start at zero",
    ),
    (["optimizer.lr_decay_style=WSD"], "needs the number of steps of its decay"),
    (["optimizer.lr_wsd_decay_steps=3"], 'use "WSD" or 0'),
    (
        ["optimizer.lr_decay_style=cosine", "optimizer.lr_warmup_steps=10"],
        "use at least 11 steps or fewer",
    ),
    (["optimizer.min_learning_rate=1"], "must not exceed optimizer.learning_rate = 0.001"),
    (["optimizer.adam_beta2=1"], "must be at least 0 and below 1"),
    (["optimizer.learning_rate=0"], "must be greater than 0"),
    (["model.num_layers=0"], "must be greater than 0"),
    (["checkpoint.keep_last=0"], "must be greater than 0"),
    (["validation.interval=5"], "needs data.validation"),
    (["data.train=[]"], "name at least one directory"),
    (['data.train=["a", "b", "a"]'], "names a corpus twice"),
    # A list whose quotes the shell removed.
    (["data.train=[a, b]"], 'quote it for the shell, such as \'data.train=["a", "b"]\''),
    (["data.train_weights=[1]"], "is for a list of corpora in data.train"),
    (['data.train=["a", "b"]', "data.train_weights=[1]"], "needs a weight for each of the 2"),
    (['data.train=["a", "b"]', "data.train_weights=[2, -1]"], "weights must be 0 or greater"),
    (['data.train=["a", "b"]', "data.train_weights=[0, 0]"], "weights must be 0 or greater"),
    (["data.phase=0"], "must be greater than 0"),
    (["data.framing=bos_eos", "data.sequence_length=2"], "leaves no text"),
    (["data.ssl_ratio=1"], "must be at least 0 and below 1"),
    (["data.cache_gib=0"], "must be greater than 0"),
    (["data.prefetch_steps=-1"], "must be 0 or greater"),
    (["data.batch_check_interval=-1"], "must be 0 or greater"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSALS)
def test_impossible_combinations_are_refused_in_one_line(
    base: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config([base, *overrides])
    line = str(raised.value)
    assert message in line
    assert "\n" not in line
    assert " = " in line
    assert line.startswith((base, "command line: ", "default: "))


def test_a_blend_is_a_list_with_or_without_weights(base: str) -> None:
    data = load_config([base, 'data.train=["a", "s3://b/c"]']).config.data
    assert data.train == data.train_corpora == ("a", "s3://b/c")
    assert data.train_weights is None
    weighted = ['data.train=["a", "b"]', "data.train_weights=[1, 0.5]", "data.phase=2"]
    data = load_config([base, *weighted]).config.data
    assert data.train_weights == (1.0, 0.5)
    assert load_config([base]).config.data.train_corpora == ("shards",)


def test_framing_takes_two_tokens_of_text(base: str) -> None:
    assert load_config([base]).config.data.row_tokens == 16
    assert load_config([base, "data.framing=bos_eos"]).config.data.row_tokens == 14


def test_a_refusal_names_the_file_that_set_the_value(base: str, tmp_path: Path) -> None:
    layer = tmp_path / "wide.toml"
    layer.write_text("[model]\nnum_attention_heads = 6\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="wide.toml: model.num_attention_heads = 6: must divide"):
        load_config([base, str(layer)])


def test_a_small_share_of_diffusion_warns(base: str) -> None:
    (warning,) = load_config([base, "objective.batch_split=0.25"]).warnings
    assert warning.startswith("command line: objective.batch_split = 0.25: training diverged")
    assert load_config([base]).warnings == ()
    assert load_config([base, "objective.alpha_0=0"]).warnings == ()


@pytest.mark.parametrize(
    ("sizes", "split", "is_valid"),
    [
        ((16, 4, 1), 0.5, True),
        ((16, 4, 4), 0.5, True),
        ((16, 1, 8), 0.5, True),
        ((16, 1, 16), 0.5, False),
        ((8, 1, 8), 1.0, True),
        ((8, 1, 8), 0.0, True),
        ((8, 3, 1), 1.0, False),
        ((30, 1, 1), 0.3, True),
        ((30, 10, 3), 0.3, True),
        ((30, 5, 1), 0.3, False),
    ],
)
def test_phases_are_dealt_evenly_or_refused(
    sizes: tuple[int, int, int], split: float, is_valid: bool
) -> None:
    global_batch_size, micro_batch_size, data_parallel_size = sizes
    arguments = {
        "global_batch_size": global_batch_size,
        "micro_batch_size": micro_batch_size,
        "data_parallel_size": data_parallel_size,
    }
    if is_valid:
        check_dealing(**arguments, batch_split=split)
        return
    with pytest.raises(ConfigError, match=r"take a multiple of (\d+)") as raised:
        check_dealing(**arguments, batch_split=split)
    unit = int(str(raised.value).split("take a multiple of ")[1].split()[0])
    check_dealing(**(arguments | {"global_batch_size": unit}), batch_split=split)


def test_the_world_size_must_fit_the_layout(base: str) -> None:
    loaded = load_config([base, "parallel.tensor_model_parallel_size=2"])
    assert check_layout(loaded.config, 8, loaded.origins) == 4
    with pytest.raises(ConfigError, match="world size 3 is not a multiple of .*: start 4 ranks"):
        check_layout(loaded.config, 3, loaded.origins)
    with pytest.raises(ConfigError, match=r"base.toml: train.global_batch_size = 16 cannot"):
        check_layout(loaded.config, 16, loaded.origins)


def test_the_vocabulary_comes_from_the_data() -> None:
    config = with_vocabulary(make_config(), vocab_size=98, mask_token_id=97, source="shards")
    assert (config.data.vocab_size, config.data.mask_token_id) == (98, 97)
    check_config(config)
    with pytest.raises(ConfigError, match=r"data.vocab_size = 98: other has 99; leave"):
        with_vocabulary(config, vocab_size=99, mask_token_id=97, source="other")
    with pytest.raises(ConfigError, match="mask token 98 is outside the vocabulary of 98"):
        with_vocabulary(make_config(), vocab_size=98, mask_token_id=98, source="shards")


def test_a_pipeline_layout_places_layers_that_do_not_divide(base: str) -> None:
    key = "parallel.pipeline_model_parallel_layout"
    arguments = [base, "model.num_layers=3", "parallel.pipeline_model_parallel_size=2"]
    config = load_config([*arguments, f'{key}="Ett|tL"']).config
    assert [config.parallel.count_stage_layers(3, stage) for stage in (0, 1)] == [2, 1]
    for wrong in ("Et|tL", "Ettt", "tt|tL", "Ettm|L"):
        with pytest.raises(ConfigError, match=r'such as "Ett\|tL"'):
            load_config([*arguments, f'{key}="{wrong}"'])
