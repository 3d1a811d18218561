"""`pretrain.evaluate` repeats the run's validation; its any-order bound is the sampler's."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints_conversion.__main__ import main as convert
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.objectives.noise.slots import draw_any_order
from megatron_eso.objectives.objective import VALIDATION_SEED
from megatron_eso.sampler import EsoLM
from tests.ranks.loop import run_loop
from tests.support.torchrun import run_module
from tests.support.training import TINY
from tests.support.world import World

NELBO_TOLERANCE = 1e-6  # relative
NUM_SAMPLES, NUM_ORDERS = 6, 3


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("nowhere", "error: RUN_DIR: nowhere: No such file or directory; see `python -m pre"),
        (".", "error: .: has no complete checkpoint; complete checkpoints: none"),
    ],
)
def test_an_error_of_all_ranks_is_reported_once(path: str, line: str, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run(
        [sys.executable, *launcher, "-m", "pretrain.evaluate", path],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    (found,) = (each for each in finished.stderr.splitlines() if each.startswith("error: "))
    assert found.startswith(line)


@pytest.mark.parallel
@pytest.mark.slow
def test_evaluate_repeats_the_runs_validation(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    # A run whose validation is to be repeated.
    run = tmp_path / "run"
    steps = {"train.num_steps": 3, "validation.num_samples": NUM_SAMPLES}
    world.run(run_loop, 1, run, tiny_data, steps)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(record for record in reversed(records) if "val/nelbo" in record)

    # Its NELBO, of both kinds of weights, on one rank and on two.
    options = ["pretrain.evaluate", str(run), "--any-order", str(NUM_ORDERS)]
    ema: dict[str, Any] = json.loads(run_module(*options))
    assert (ema["step"], ema["weights"], ema["num_samples"]) == (3, "ema", NUM_SAMPLES)
    assert ema["nelbo"] == pytest.approx(last["val/nelbo"], rel=NELBO_TOLERANCE)
    assert ema["nelbo_stderr"] == pytest.approx(last["val/nelbo_stderr"], rel=1e-3)
    layout = "parallel.tensor_model_parallel_size=2"
    data = ["--data", str(tiny_data / "validation")]
    raw = json.loads(run_module(*options, layout, *data, "--weights", "raw", ranks=2))
    assert raw["nelbo"] == pytest.approx(last["val_raw/nelbo"], rel=NELBO_TOLERANCE)

    # The any-order bound, from the sampler's likelihoods of the same orders.
    length, alpha_0 = int(TINY["data.sequence_length"]), float(TINY["objective.alpha_0"])
    indices = np.arange(NUM_SAMPLES)
    x_0 = torch.from_numpy(TokenDataset.open(tiny_data / "validation").rows(indices, length))
    for answer in (ema, raw):
        folder = tmp_path / answer["weights"]
        convert(["to-sampler", str(run), str(folder), "--weights", answer["weights"]])
        model = EsoLM.from_pretrained(folder)
        log_likelihoods = [
            model.log_likelihood(
                x_0,
                torch.from_numpy(
                    draw_any_order(VALIDATION_SEED, indices, k, alpha_0, length).permutation_BT
                ),
            )
            for k in range(NUM_ORDERS)
        ]
        bound = math.log(NUM_ORDERS) - torch.stack(log_likelihoods).logsumexp(0)
        nats = float(bound.mean()) / length
        assert answer["any_order_nats_per_token"] == pytest.approx(nats, rel=1e-5)


def test_any_orders_are_random_first_and_ascending_after() -> None:
    length, alpha_0, num_samples = 64, 0.25, 2000
    noise = draw_any_order(0, np.arange(num_samples), 1, alpha_0, length)
    assert np.array_equal(np.sort(noise.permutation_BT, axis=1)[0], np.arange(length))
    other = draw_any_order(0, np.arange(num_samples), 2, alpha_0, length)
    assert not np.array_equal(noise.permutation_BT, other.permutation_BT)
    # The ascending tail is at least as long as the positions that were not drawn to come first.
    is_rise = np.diff(noise.permutation_BT, axis=1) > 0
    tail = np.cumprod(is_rise[:, ::-1], axis=1).sum(axis=1) + 1
    mean = (1 - alpha_0) * length
    error = math.sqrt(alpha_0 * (1 - alpha_0) * length / num_samples)
    # A random slot joins the tail by chance now and then, never leaves it.
    assert mean - 5 * error < tail.mean() < mean + 1
