"""Mistakes in the files and values of a configuration: each is one line with the remedy."""

import json
import math
from pathlib import Path

import pytest

from megatron_eso.config.divisibility import check_dealing, even_layout, nearest_divisors
from megatron_eso.config.layers import SHIPPED_CONFIGS
from megatron_eso.config.loading import config_to_dict, load_config
from megatron_eso.config.sections import KEYS
from megatron_eso.errors import ConfigError
from tests.support.training import TINY

LEAST = [f"{key}={value}" for key, value in TINY.items()] + ["run.directory=run", "data.train=data"]


def refuse(*arguments: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config(arguments, folder=SHIPPED_CONFIGS)
    line = str(refused.value)
    assert "\n" not in line
    assert len(line) < 1000
    return line


@pytest.mark.parametrize("key", ["run.directory", "data.quarantine", "checkpoint.init_from"])
@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        ("", "names nothing; name a folder"),
        (" ", "names nothing; name a folder"),
        ('"a\\u0000b"', "holds a NUL character; leave it out"),
        ("s3://bucket/run", "is a URL; name a folder that is mounted"),
        ("a/" + "x" * 300 + "/b", "has a part of 300 bytes"),
    ],
)
def test_a_text_that_cannot_be_a_path_is_refused(key: str, value: str, remedy: str) -> None:
    line = refuse(*LEAST, f"{key}={value}")
    assert line.startswith(f"command line: {key} = ")
    assert remedy in line


@pytest.mark.parametrize("key", ["data.train", "data.validation"])
def test_data_may_have_a_url_but_not_an_empty_name(key: str) -> None:
    assert load_config([*LEAST, f"{key}=s3://bucket/shards"]).config.get(key)
    assert "names nothing" in refuse(*LEAST, f"{key}=")
    assert "names nothing" in refuse(*LEAST, 'data.train=["a", ""]')


@pytest.mark.parametrize(
    "override",
    [
        "watchdog.start_seconds=1e12",
        "checkpoint.end_margin_minutes=1e300",
        "model.ffn_hidden_size=100000000000",
        "model.hidden_size=9000000000000000000",
        "model.num_layers=9000000000000000000",
        "model.num_query_groups=9000000000000000000",
        "data.sequence_length=9000000000000000000",
        "data.sequence_length=100000000",
        "data.prefetch_steps=9000000000000000000",
        "train.global_batch_size=9000000000000000000",
        "train.micro_batch_size=9000000000000000000",
        "train.micro_batch_size=1000000",
        "validation.micro_batch_size=1000000",
        "parallel.tensor_model_parallel_size=9000000000000000000",
        "parallel.pipeline_model_parallel_size=9000000000000000000",
        "optimizer.adam_eps=99999999999",
        "optimizer.learning_rate=1e30",
        "optimizer.weight_decay=1e30",
        "optimizer.clip_grad=1e300",
        "model.norm_epsilon=1e30",
        "model.init_method_std=1e30",
        "train.spike_deviations=1e300",
        "train.skip_deviations=1e300",
        "data.cache_gib=1e300",
        "data.train_weights=[1e300]",
    ],
)
def test_sizes_beyond_any_machine_are_refused(override: str) -> None:
    key = override.partition("=")[0]
    line = refuse(*LEAST, override)
    assert line.startswith(f"command line: {key} = ")
    assert "use at most " in line


def test_every_number_with_a_fraction_has_an_upper_limit() -> None:
    for path, key in KEYS.items():
        is_real = float in key.accepted_types or tuple[float, ...] in key.accepted_types
        is_bounded = key.interval.le is not None or key.interval.lt is not None
        assert not is_real or is_bounded or key.largest < math.inf, path


def test_suggestions_end_for_any_sizes() -> None:
    huge = 2**62
    assert even_layout(huge, 3) is None
    assert even_layout(3, huge) is None
    assert even_layout(5, 2) == "Ettt|ttL"
    assert nearest_divisors(huge, 3) == "2 or 4"
    with pytest.raises(ConfigError, match="take a multiple of"):
        check_dealing(
            global_batch_size=huge + 1,
            micro_batch_size=3,
            data_parallel_size=huge,
            batch_split=0.5,
        )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.num_steps=" + "9" * 5000, "train.num_steps = "),
        ("train.num_steps=0x" + "f" * 5000, "train.num_steps = a number of thousands of digits"),
        ("train.num_steps=" + "[" * 5000, "train.num_steps = "),
        ("optimizer.learning_rate=" + "[" * 5000, "optimizer.learning_rate = "),
        ("run.seed=" + "x" * 5000, "run.seed = "),
        ("x" * 300, "there is no such file"),
        ("x" * 300 + "=1", " is not a key"),
    ],
)
def test_a_value_that_python_cannot_read_is_shortened(override: str, words: str) -> None:
    assert words in refuse(*LEAST, override)


def test_a_deeply_nested_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "deep.toml"
    path.write_text("[run]\nseed = " + "[" * 100_000)
    assert refuse(str(path)) == f"{path}: cannot be read as TOML: it nests lists too deeply"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("owt_small", "owt_small.toml"),
        ("owt_smal.toml", "owt_small.toml"),
        ("tp2_sp.toml", "parallel/tp2_sp.toml"),
    ],
)
def test_a_similar_name_is_suggested(name: str, meant: str) -> None:
    line = refuse(name)
    assert f"did you mean {meant}?" in line
    assert "; the package has base_1p7b.toml, base_1p7b_tp.toml, long_10240.toml, owt_small" in line


def test_a_file_here_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").touch()
    assert f"did you mean {tmp_path}/mine.toml?" in refuse(f"{tmp_path}/mine")


def test_the_configuration_of_a_run_is_a_layer(tmp_path: Path) -> None:
    written = load_config([*LEAST, "model.qk_layernorm=true"]).config
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_to_dict(written)))
    assert load_config([str(path)]).config == written
    assert load_config([str(path), "run.seed=7"]).config.run.seed == 7
    assert f"{path}: run.seed = -1: must be" in refuse(
        str(_change(path, {"run": {"seed": -1, "directory": "run"}}))
    )


def _change(path: Path, sections: dict[str, object]) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | sections))
    return path


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.json", "{}", "x.json: holds no format_version; give the config.json of a run, or a"),
        ("x.json", "[1]", "x.json: holds no configuration; name a run directory's config.json"),
        ("x.json", "run: 1", "x.json: cannot be read as config.json: "),
        ("x.yaml", "run: 1", "x.yaml: layers are TOML files; write this one as TOML"),
    ],
)
def test_other_formats_are_refused_with_the_reason(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert words in refuse(str(path))


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbf[run]\r\nseed = 7\r\n")
    assert load_config([*LEAST, str(path)]).config.run.seed == 7


def test_a_mistake_in_toml_names_its_key(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text("[run]\nseed = 1\n[model]\nnum_layers = 4x\n")
    assert refuse(str(path)).startswith(f"{path}: model.num_layers: cannot be read as TOML: ")


def test_all_missing_keys_are_listed_and_an_empty_file_is_blamed(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.touch()
    line = refuse(str(path))
    assert line.startswith(f"{path}: run.directory, model.num_layers, model.hidden_size, ")
    assert "optimizer.learning_rate are missing: set directory under [run] or pass" in line


def test_heads_that_do_not_divide_name_the_shipped_variant() -> None:
    line = refuse("base_1p7b.toml", "parallel.tensor_model_parallel_size=2")
    assert "or add the layer base_1p7b_tp.toml after base_1p7b.toml" in line
    assert load_config(
        ["base_1p7b.toml", "base_1p7b_tp.toml", "parallel.tensor_model_parallel_size=2"],
        folder=SHIPPED_CONFIGS,
    )
