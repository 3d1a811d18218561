"""`pretrain.sensitivity`: the numbers of `pretrain.evaluate` and of the sampler, on any layout."""

import json
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
from tests.support.training import FAMILY, TINY
from tests.support.world import World

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

NUM_SAMPLES, SET_SIZE = 6, 4
LENGTH, ALPHA_0 = int(TINY["data.sequence_length"]), float(TINY["objective.alpha_0"])
STEPS = {"train.num_steps": 2, "validation.num_samples": NUM_SAMPLES}
# The same float32 computation in other sums.
TOLERANCE = 1e-5


def measure(*arguments: str, ranks: int = 1) -> dict[str, float]:
    """Run the command, and return the nats per token of each schedule by its label."""
    answer: dict[str, Any] = json.loads(
        run_module("pretrain.sensitivity", *arguments, "--json", ranks=ranks)
    )
    return {
        f"{each['name']} {each['tokens_per_step']}": each["nats_per_token"]
        for each in answer["likelihoods"]
    }


def parallel_nats(model: EsoLM, data: Path) -> float:
    """Return the sampler's nats per token in the trained order, in steps of `SET_SIZE` tokens."""
    indices = np.arange(NUM_SAMPLES)
    x_0 = torch.from_numpy(TokenDataset.open(data / "validation").rows(indices, LENGTH))
    order = draw_any_order(VALIDATION_SEED, indices, 0, ALPHA_0, LENGTH).permutation_BT
    permutation = torch.from_numpy(order)
    mask, total = model.config.mask_token_id, 0.0
    for start in range(0, LENGTH, SET_SIZE):
        step = slice(start, start + SET_SIZE)
        z_t = x_0.scatter(1, permutation[:, start:], mask)
        logits = model.diffusion_logits(z_t, permutation)[:, step].double()
        logits[..., mask] = -torch.inf
        targets = x_0.gather(1, permutation[:, step])
        total -= float(logits.log_softmax(-1).gather(2, targets[..., None]).sum())
    return total / (NUM_SAMPLES * LENGTH)


def test_likelihoods_are_those_of_evaluate_and_of_the_sampler(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    world.run(run_loop, 1, run, tiny_data, STEPS)
    found = measure(str(run))
    evaluated = json.loads(run_module("pretrain.evaluate", str(run), "--any-order", "1"))
    assert found["trained 1"] == pytest.approx(evaluated["any_order_nats_per_token"], rel=1e-12)
    assert found["NELBO, alpha_0 = 0.25 None"] == evaluated["nelbo"]

    # Without a diffusion phase the NELBO is the likelihood from left to right.
    assert found["NELBO, alpha_0 = 0 None"] == pytest.approx(found["left to right 1"], rel=1e-6)

    # The sampler's own steps.
    convert(["to-sampler", str(run), str(tmp_path / "sampler")])
    expected = parallel_nats(EsoLM.from_pretrained(tmp_path / "sampler"), tiny_data)
    assert found[f"trained {SET_SIZE}"] == pytest.approx(expected, rel=TOLERANCE)

    # Another layout, and the files of the report.
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    sharded = measure(str(run), *layout, ranks=2)
    assert sharded == pytest.approx(found, rel=TOLERANCE)
    report = json.loads((run / "sensitivity.json").read_text())
    assert (report["step"], report["num_samples"]) == (2, NUM_SAMPLES)
    assert (run / "sensitivity.svg").read_text().startswith("<svg ")


def test_an_objective_without_orders_has_its_nelbo(
    world: World, tiny_data: Path, tmp_path: Path
) -> None:
    world.run(run_loop, 1, tmp_path, tiny_data, FAMILY["bd3_lm"] | STEPS)
    evaluated = json.loads(run_module("pretrain.evaluate", str(tmp_path)))
    assert measure(str(tmp_path))["NELBO, block_size = 4 None"] == evaluated["nelbo"]
