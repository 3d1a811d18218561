"""Validation: the same number on every layout, the oracle's number, and nothing changed by it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints_conversion.__main__ import main as convert
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.objectives.noise.schedule import LogLinearSchedule
from megatron_eso.objectives.noise.slots import draw_noise, validation_times
from megatron_eso.objectives.objective import VALIDATION_SEED
from megatron_eso.sampler import EsoLM
from tests.ranks.evaluation import evaluate_tiny
from tests.ranks.training import train_tiny
from tests.support.dense_oracle import OracleConfig, dense_losses
from tests.support.training import LAYOUTS, OVERLAPPED, Overrides, read_checkpoint, tiny_config
from tests.support.world import World

pytestmark = pytest.mark.parallel

NELBO_TOLERANCE = 1e-6  # relative
NUM_STEPS = 2
# Does not divide by two data-parallel ranks or by the micro-batch.
SAMPLES: Overrides = {"validation.num_samples": 7, "validation.micro_batch_size": 2}
FEW: Overrides = {"validation.num_samples": 1}


@pytest.fixture(scope="module")
def trained(world: World, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained")
    world.run(train_tiny, 1, run, tiny_data, {}, NUM_STEPS)
    return run


def copy_run(trained: Path, to: Path) -> Path:
    to.mkdir()
    (to / "checkpoints").symlink_to(trained / "checkpoints")
    return to


@pytest.mark.parametrize("layout", ["TP=2 SP", "PP=2 interleaved", "DP=2", "DP=2 overlapped"])
def test_validation_does_not_depend_on_the_layout(
    layout: str, trained: Path, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    num_ranks, overrides = LAYOUTS.get(layout, (2, OVERLAPPED))
    one = copy_run(trained, tmp_path / "one")
    expected = world.run(evaluate_tiny, 1, one, tiny_data, SAMPLES)[0]
    run = copy_run(trained, tmp_path / "run")
    for ema, raw, _ in world.run(evaluate_tiny, num_ranks, run, tiny_data, overrides | SAMPLES):
        for found, reference in ((ema, expected[0]), (raw, expected[1])):
            assert found.nelbo == pytest.approx(reference.nelbo, rel=NELBO_TOLERANCE)
            assert found.standard_error == pytest.approx(
                reference.standard_error, rel=1000 * NELBO_TOLERANCE
            )
        assert ema.nelbo != raw.nelbo


def test_a_rank_may_have_no_validation_samples(
    trained: Path, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    run = copy_run(trained, tmp_path / "run")
    answers = world.run(evaluate_tiny, 2, run, tiny_data, OVERLAPPED | FEW)
    assert answers[0][0].nelbo == answers[1][0].nelbo
    assert math.isnan(answers[0][0].standard_error)


def test_an_interleaved_pipeline_validates_fewer_samples_than_it_has_stages(
    trained: Path, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    overrides = LAYOUTS["PP=2 interleaved"][1] | FEW
    one = copy_run(trained, tmp_path / "one")
    expected = world.run(evaluate_tiny, 1, one, tiny_data, FEW)[0][0].nelbo
    run = copy_run(trained, tmp_path / "run")
    for ema, _, _ in world.run(evaluate_tiny, 2, run, tiny_data, overrides):
        assert ema.nelbo == pytest.approx(expected, rel=NELBO_TOLERANCE)


def test_validation_leaves_the_state_as_it_was(
    trained: Path, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    """One more step with and without validations before it: the same to the last bit."""
    for name, overrides, num_ranks in (("fp32", {}, 1), ("overlapped", OVERLAPPED, 2)):
        run = copy_run(trained, tmp_path / name)
        after = world.run(evaluate_tiny, num_ranks, run, tiny_data, overrides)[0][2]
        plain = tmp_path / f"{name}_plain"
        (plain / "checkpoints").mkdir(parents=True)
        step = f"step_{NUM_STEPS:08d}"
        (plain / "checkpoints" / step).symlink_to(trained / "checkpoints" / step)
        straight = world.run(train_tiny, num_ranks, plain, tiny_data, overrides, NUM_STEPS + 1)[0]
        expected, found = read_checkpoint(straight.checkpoint), read_checkpoint(after)
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), (name, key)


def test_validation_is_the_oracles(
    trained: Path, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    # The run's own evaluation, and its network as the oracle reads it.
    run = copy_run(trained, tmp_path / "run")
    _, raw, _ = world.run(evaluate_tiny, 1, run, tiny_data, SAMPLES)[0]
    convert(["to-sampler", str(trained), str(tmp_path / "sampler"), "--weights", "raw"])
    model = EsoLM.from_pretrained(tmp_path / "sampler", dtype=torch.float64)
    parameters = dict(model.network.state_dict())
    config = tiny_config(run, tiny_data, SAMPLES)
    assert config.data.mask_token_id is not None
    oracle = OracleConfig(
        num_layers=config.model.num_layers,
        num_heads=config.model.num_attention_heads,
        num_groups=config.model.num_query_groups,
        mask_token_id=config.data.mask_token_id,
    )
    # The oracle's losses of the same samples, times and noise, phase by phase.
    length, alpha_0 = config.data.sequence_length, config.objective.alpha_0
    indices = np.arange(config.validation.num_samples)
    x_0 = torch.from_numpy(TokenDataset.open(tiny_data / "validation").rows(indices, length))
    times = validation_times(VALIDATION_SEED, indices, len(indices))
    nelbo = np.zeros(len(indices))
    for is_sequential in (False, True):
        noise = draw_noise(
            VALIDATION_SEED,
            indices,
            np.full(len(indices), is_sequential),
            times,
            LogLinearSchedule(alpha_0),
            length,
            is_validation=True,
        )
        losses = dense_losses(parameters, oracle, x_0, noise, alpha_0=alpha_0, loss_type="elbo")
        parts = (losses.nll_BT.sum(1) * losses.elbo_weights_B).detach().numpy() / length
        nelbo += parts
        if not is_sequential:
            by_tenth: dict[float, list[float]] = {}
            for t, part in zip(times, parts, strict=True):
                by_tenth.setdefault((math.floor(10 * t) + 0.5) / 10, []).append(part)
            expected = {t: sum(found) / len(found) for t, found in by_tenth.items()}
            assert raw.by_time["diffusion"] == pytest.approx(expected, rel=NELBO_TOLERANCE)
    # The mean and its standard error.
    assert raw.nelbo == pytest.approx(nelbo.mean(), rel=NELBO_TOLERANCE)
    error = nelbo.std(ddof=1) / math.sqrt(len(nelbo))
    assert raw.standard_error == pytest.approx(error, rel=1000 * NELBO_TOLERANCE)
