"""A tiny model continues at T = 10240 with the shipped layer: one step, in bounded memory."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints_conversion.__main__ import main as convert
from data_tools.builds.dataset import BuildOptions, build_dataset
from tests.ranks.training import train_tiny
from tests.support.training import Overrides, tiny_arguments
from tests.support.world import World

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

LAYER = "long_10240.toml"
SMALL: Overrides = {
    "model.num_layers": 2,
    "model.num_attention_heads": 1,
    "optimizer.ema_decay": 0,
}
# The process takes 0.7 GiB. Dense float32 scores of 2T x 2T rows would take 1.6 GiB for each head.
LARGEST_GIB = 1.2


def test_weights_of_short_samples_continue_at_10240(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    world.run(train_tiny, 1, tmp_path / "short", tiny_data, SMALL, 1)
    sampler = tmp_path / "sampler"
    convert(["to-sampler", str(tmp_path / "short"), str(sampler)])
    # Shards whose records hold long samples.
    shards, texts = tmp_path / "shards", str(tiny_data.parent / "texts")
    tokenizer = str(tiny_data.parent / "tokenizer")
    options = BuildOptions(inputs=[texts], tokenizer=tokenizer, out=shards, validation_share=0.4)
    build_dataset(options)
    # One step of the shipped layer, made small, with a validation before and after it.
    run = tmp_path / "long"
    overrides: Overrides = SMALL | {
        "checkpoint.init_from": f'"{sampler}"',
        "train.num_steps": 1,
        "train.global_batch_size": 2,
        "optimizer.lr_warmup_steps": 0,
        "validation.num_samples": 1,
    }
    arguments = tiny_arguments(run, shards, overrides)
    of_layer = [each for each in arguments if not each.startswith("data.sequence_length")]
    command = [sys.executable, "-m", "pretrain.train", LAYER, *of_layer]
    finished = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "data.sequence_length: 24 -> 10240" in finished.stderr
    # Its numbers and its memory.
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    step = next(record for record in records if "train/loss" in record)
    assert math.isfinite(step["train/grad_norm"])
    assert 1 < step["train/loss"] < 10
    assert next(r for r in records if "val/nelbo" in r)["val/nelbo"] < 10
    assert step["perf/memory_gib"] < LARGEST_GIB
