"""Every shipped configuration resolves, fits a layout, and has a dry run that can be read back."""

from pathlib import Path

import pytest

from megatron_eso.config.layers import SHIPPED_CONFIGS
from megatron_eso.config.loading import load_config
from megatron_eso.errors import ConfigError
from megatron_eso.estimates.dry_run import format_dry_run

TENSOR_PARALLEL_BASE = ["base_1p7b.toml", "base_1p7b_tp.toml"]
WHOLE = {
    "quickstart.toml": ["quickstart.toml"],
    "owt_small.toml": ["owt_small.toml"],
    "long_10240.toml": ["owt_small.toml", "long_10240.toml"],
    "base_1p7b.toml": ["base_1p7b.toml"],
    "base_1p7b_tp.toml": TENSOR_PARALLEL_BASE,
}
LAYERS = {
    str(path.relative_to(SHIPPED_CONFIGS)): [
        *TENSOR_PARALLEL_BASE,
        str(path.relative_to(SHIPPED_CONFIGS)),
    ]
    for folder in ("parallel", "scale")
    for path in sorted((SHIPPED_CONFIGS / folder).glob("*.toml"))
}
COMBINATIONS = WHOLE | LAYERS


def test_every_shipped_file_is_tried() -> None:
    shipped = {str(path.relative_to(SHIPPED_CONFIGS)) for path in SHIPPED_CONFIGS.rglob("*.toml")}
    assert shipped == set(COMBINATIONS)


@pytest.mark.parametrize("files", COMBINATIONS.values(), ids=COMBINATIONS.keys())
def test_a_dry_run_reads_back(files: list[str], tmp_path: Path) -> None:
    loaded = load_config([*files, "data.vocab_size=50258"], folder=SHIPPED_CONFIGS)
    assert loaded.warnings == ()
    for world_size in (None, 2 * loaded.config.parallel.model_parallel_size):
        text = format_dry_run(loaded, world_size)
        (tmp_path / "resolved.toml").write_text(text, encoding="utf-8")
        assert load_config([str(tmp_path / "resolved.toml")]).config == loaded.config


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_tensor_parallel_variant_divides(size: int) -> None:
    layout = f"parallel.tensor_model_parallel_size={size}"
    loaded = load_config([*TENSOR_PARALLEL_BASE, layout], folder=SHIPPED_CONFIGS)
    assert loaded.config.model.num_attention_heads == 16


def test_a_dry_run_says_what_the_run_takes() -> None:
    loaded = load_config(["owt_small.toml", "data.vocab_size=50258"], folder=SHIPPED_CONFIGS)
    text = format_dry_run(loaded, 8)
    for line in (
        "# layout: 8 ranks = tensor 1 x pipeline 1 x data 8; 12 layers per stage",
        "# step: 512 samples, 524,288 tokens; each rank 2 micro-batches of 32, "
        "16 diffusion and 16 sequential samples each",
        "# run: 250,000 steps, 1.311e+11 tokens",
        "# parameters: 162,391,680 = ",
        "# FLOPs per token, forward and backward: 1.006e+09 (",
        "# memory of the fullest rank, GiB: ",
        "# checkpoint: 2.42 GiB; 2 are kept, so up to 7.26 GiB while one is saved",
    ):
        assert line in text


def test_a_dry_run_says_what_long_samples_take() -> None:
    layers = ["owt_small.toml", "long_10240.toml", "data.vocab_size=50258"]
    text = format_dry_run(load_config(layers, folder=SHIPPED_CONFIGS), 64)
    assert "# step: 512 samples, 5,242,880 tokens; each rank 2 micro-batches of 4, " in text
    assert "# memory of the fullest rank, GiB: 47.5 = weights 0.302 + " in text


def test_a_dry_run_refuses_ranks_that_do_not_fit_and_repeats_warnings() -> None:
    loaded = load_config(["owt_small.toml", "objective.batch_split=0.25"], folder=SHIPPED_CONFIGS)
    assert "# warning: command line: objective.batch_split = 0.25: " in format_dry_run(loaded)
    for world_size in (0, 3):
        with pytest.raises(ConfigError, match="start|cannot be dealt"):
            format_dry_run(loaded, world_size)


def test_without_shards_the_dry_run_says_that_the_vocabulary_is_unknown() -> None:
    loaded = load_config(["quickstart.toml"], folder=SHIPPED_CONFIGS)
    text = format_dry_run(loaded)
    assert "# vocabulary: not known without the shards" in text
    assert "= embedding 0 + layers 3,159,040 " in text


def test_a_dry_run_counts_the_layers_of_every_stage() -> None:
    overrides = [
        "quickstart.toml",
        "parallel.pipeline_model_parallel_size=2",
        "parallel.pipeline_model_parallel_layout=Ettt|tL",
        "train.global_batch_size=8",
    ]
    text = format_dry_run(load_config(overrides, folder=SHIPPED_CONFIGS), 2)
    assert "layout: 2 ranks = tensor 1 x pipeline 2 x data 1; 3, 1 layers per stage\n" in text
    assert "each rank 1 micro-batch of 8," in text
