"""What a run reports while it trains: its curves, its status, its slow ranks."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_tools.builds.dataset import BuildOptions, build_dataset
from megatron_eso.data.samples.training_data import TrainingData
from tests.ranks.loop import Ran, run_loop
from tests.ranks.watching import WORK_SECONDS, never_finite, run_with_a_slow_rank, stop_at_step_3
from tests.support.processes import HANG_SECONDS
from tests.support.training import Overrides, tiny_config
from tests.support.world import World

pytestmark = pytest.mark.parallel

ROOT = Path(__file__).resolve().parents[2]
STEPS, INTERVAL, BATCH = 6, 2, 8

# Of the public contract, but for those of a GPU.
CONTRACT = {
    *(f"train/{name}" for name in ("loss", "nelbo", "loss_diffusion", "loss_sequential")),
    *(f"train/{name}" for name in ("grad_norm", "learning_rate", "skipped_steps")),
    *(f"perf/{name}" for name in ("tokens_per_second", "tokens_per_second_per_gpu")),
    *(f"perf/{name}" for name in ("step_seconds", "data_wait_seconds", "memory_gib")),
    *("progress/tokens", "progress/flops", "val/nelbo", "val/perplexity", "val/nelbo_stderr"),
    *("val/nelbo_diffusion", "val/nelbo_sequential", "val_raw/nelbo"),
}
MORE = {
    *("train/spikes", "train/rollbacks", "train/deviations", "perf/restarts"),
    *("perf/checkpoint_seconds", "perf/checkpoint_write_seconds"),
    *("perf/straggler_rank", "perf/straggler_seconds", "perf/straggler_spread"),
    *(f"val/nelbo_diffusion_by_t/{t}" for t in ("0.05", "0.55", "0.95")),
}


@pytest.fixture(scope="module")
def second_corpus(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a third of the texts of the tiny data."""
    out = tmp_path_factory.mktemp("second") / "shards"
    texts = str(tiny_data.parent / "texts" / "2*.txt")
    tokenizer = str(tiny_data.parent / "tokenizer")
    build_dataset(BuildOptions(inputs=[texts], tokenizer=tokenizer, out=out, record_tokens=4096))
    return out


@pytest.fixture(scope="module")
def overrides(tiny_data: Path, second_corpus: Path) -> Overrides:
    """Return overrides for a short run on two corpora."""
    return {
        "data.train": f'["{tiny_data / "train"}", "{second_corpus}"]',
        "data.train_weights": "[3, 1]",
        "train.num_steps": STEPS,
        "train.log_interval": INTERVAL,
        "checkpoint.interval": 2,
        "checkpoint.async_save": "false",  # a save in the background has no certain end
        "validation.interval": 3,
        "validation.num_samples": 20,
        "optimizer.weight_decay": 0.5,
    }


@pytest.fixture(scope="module")
def watched(
    world: World, tiny_data: Path, overrides: Overrides, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Train on two corpora, with a slow rank 1."""
    run = tmp_path_factory.mktemp("watched")
    errors = world.run(run_with_a_slow_rank, 2, run, tiny_data, overrides)
    assert errors == [None, None]
    return run


def read_records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def run_status(run: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command in an interpreter that has neither torch nor megatron nor numpy."""
    program = (
        "import runpy, sys\n"
        "for name in ('torch', 'megatron', 'numpy'): sys.modules[name] = None\n"
        "runpy.run_module('pretrain.status', run_name='__main__', alter_sys=True)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, str(run), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


def test_every_tag_is_there_and_shows_the_records(watched: Path) -> None:
    accumulator = EventAccumulator(str(watched / "tensorboard")).Reload()
    tags = set(accumulator.Tags()["scalars"])
    assert tags >= CONTRACT | MORE, (CONTRACT | MORE) - tags
    recorded = set().union(*map(set, read_records(watched)))
    scaling = {"scaling/val_nelbo_by_flops", "scaling/val_nelbo_by_tokens"}
    assert recorded == tags | scaling | {"step", "perf/time"}
    for axis in ("flops", "tokens"):
        curve = EventAccumulator(str(watched / "tensorboard" / f"scaling_by_{axis}")).Reload()
        assert curve.Tags()["scalars"] == [f"scaling/val_nelbo_by_{axis}"]


def test_the_text_tab_shows_configuration_and_layout(watched: Path) -> None:
    accumulator = EventAccumulator(str(watched / "tensorboard")).Reload()
    texts = {
        name: accumulator.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()
        for name in ("config", "layout")
    }
    assert "weight_decay = 0.5" in texts["config"]
    assert "TP=1 PP=1" in texts["layout"]
    assert "ranks 0, 1" in texts["layout"]


def test_a_slow_rank_is_found(watched: Path) -> None:
    last = [record for record in read_records(watched) if "train/loss" in record][-1]
    assert last["perf/straggler_rank"] == 1
    num_passes = BATCH / 2 / 2  # two ranks, micro-batches of two
    assert last["perf/straggler_seconds"] == WORK_SECONDS[1] * num_passes
    assert last["perf/straggler_spread"] == 1.5  # over the median, the mean of two ranks
    log = (watched / "logs" / "rank_00000.log").read_text()
    assert re.search(r"slow: rank 1 on \S+, 1\.50 times the median", log)


def test_the_mix_is_that_of_the_samples(
    watched: Path, tiny_data: Path, second_corpus: Path, overrides: Overrides
) -> None:
    config = tiny_config(watched, tiny_data, overrides)
    data = TrainingData.open(config.data, config.run.seed)
    for record in read_records(watched):
        if "train/loss" not in record:
            continue
        indices = np.arange((record["step"] - INTERVAL) * BATCH, record["step"] * BATCH)
        corpus_N = data.locate(indices).corpus_N
        for number, corpus in enumerate((tiny_data / "train", second_corpus)):
            share = record[f"data/share/{corpus}"]
            assert share == (corpus_N == number).mean()


def test_the_bins_of_the_noise_make_the_diffusion_phase(watched: Path) -> None:
    (first, *_) = [record for record in read_records(watched) if "val/nelbo" in record]
    bins = {key: value for key, value in first.items() if "val/nelbo_diffusion_by_t" in key}
    # Times are stratified: two of 20 samples in every tenth, but for an edge.
    assert len(bins) == 10
    assert np.mean(list(bins.values())) == pytest.approx(first["val/nelbo_diffusion"], rel=0.2)


def test_status_of_a_finished_run(watched: Path) -> None:
    shown = run_status(watched, "--watch", "1")  # ends since the run has
    assert shown.returncode == 0, shown.stderr
    lines = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines())
    assert lines["state"].startswith("finished: train.num_steps reached (process ")
    assert lines["step"] == f"{STEPS}/{STEPS} (100.0 %)"
    assert lines["checkpoint"].startswith(f"step_{STEPS:08d}, ")
    assert lines["restarts"] == "0"
    assert lines["nodes"].endswith("2 ranks")
    assert lines["speed"].split()[1] == "tokens/s,"
    assert lines["loss"].startswith(f"{read_records(watched)[-2]['train/loss']:.4f} (diffusion ")
    assert "validation" in lines
    found = json.loads(run_status(watched, "--json").stdout)
    assert (found["state"], found["step"], found["num_ranks"]) == ("finished", STEPS, 2)


def test_status_of_an_interrupted_and_resumed_run(
    world: World, tiny_data: Path, overrides: Overrides, tmp_path: Path
) -> None:
    ranks: list[Ran] = world.run(run_loop, 2, tmp_path, tiny_data, overrides, stop_at_step_3)
    assert [(ran.error, ran.counters.step) for ran in ranks] == [(None, 3)] * 2
    found = json.loads(run_status(tmp_path, "--json").stdout)
    assert (found["state"], found["reason"], found["step"]) == ("interrupted", "SIGUSR1", 3)
    assert found["last_checkpoint"] == "step_00000003"
    assert "state        interrupted: SIGUSR1 (" in run_status(tmp_path).stdout
    assert not any(r["step"] == 3 for r in read_records(tmp_path) if "val/nelbo" in r)
    world.run(run_loop, 2, tmp_path, tiny_data, overrides)
    steps = [r["step"] for r in read_records(tmp_path) if "val/nelbo" in r]
    assert steps == [0, 3, 6]  # the resumed job has validated step 3
    found = json.loads(run_status(tmp_path, "--json").stdout)
    assert (found["state"], found["restarts"]) == ("finished", 1)


def test_raw_weights_are_validated_unless_the_key_is_off(
    world: World, tiny_data: Path, overrides: Overrides, watched: Path, tmp_path: Path
) -> None:
    overrides = overrides | {"validation.raw_weights": "false", "train.num_steps": 2}
    world.run(run_loop, 2, tmp_path, tiny_data, overrides)
    (with_raw, *_) = [record for record in read_records(watched) if "val/nelbo" in record]
    (without, *_) = [record for record in read_records(tmp_path) if "val/nelbo" in record]
    assert without.keys() == {tag for tag in with_raw if not tag.startswith("val_raw/")}
    log = (tmp_path / "logs" / "rank_00000.log").read_text()
    assert re.search(r"step 0 \| validation NELBO .* \(EMA weights\)", log)


def test_status_of_a_failed_run(
    world: World, tiny_data: Path, overrides: Overrides, tmp_path: Path
) -> None:
    overrides = overrides | {"train.max_skipped_in_row": 2, "train.log_interval": 1}
    world.run(run_loop, 2, tmp_path, tiny_data, overrides, never_finite)
    shown = run_status(tmp_path).stdout
    assert "state        failed: step 2: 2 updates in a row were skipped" in shown
    assert "checkpoint   none yet" in shown
    assert "loss         nan" in shown


def test_status_of_no_run(tmp_path: Path) -> None:
    shown = run_status(tmp_path)
    assert shown.returncode == 2
    assert shown.stderr == (
        f"error: {tmp_path}: holds no status.json; name the run.directory of a run that has "
        f"started\n"
    )
    (tmp_path / "status.json").write_text('{"state": ')
    assert run_status(tmp_path).returncode == 2
