"""Training is the same on every layout and at every micro-batch size."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ranks.training import Trained, train_tiny
from tests.support.training import (
    ESO_LM_A,
    FAMILY,
    LAYOUTS,
    OVERLAPPED,
    SCALED,
    Overrides,
    read_checkpoint,
)
from tests.support.world import World

pytestmark = pytest.mark.parallel

NUM_STEPS = 5
LOSS_TOLERANCE = 1e-5  # relative
UPDATE_TOLERANCE = 1e-3  # of a tensor's update over all steps, relative, in the Euclidean norm
NUM_PARAMETERS_MOVED = 0.5  # least share of a tensor's elements that the steps must have moved

SMALL: Overrides = OVERLAPPED | {"train.micro_batch_size": 1}
CASES: dict[str, tuple[int, Overrides]] = {
    **{name: layout for name, layout in LAYOUTS.items() if name != "1 rank"},
    "DP=2 overlapped": (2, OVERLAPPED),
    "DP=2 overlapped, micro-batch 1": (2, SMALL),
    "micro-batch 1": (1, {"train.micro_batch_size": 1}),
    "micro-batch 4": (1, {"train.micro_batch_size": 4}),
}

OBJECTIVES: dict[str, Overrides] = {"eso_lm": {}, "eso_lm a": ESO_LM_A, **FAMILY}
# The other objectives go through the same code: the richest layout is enough for them.
RICHEST = "TP=2 SP PP=2"

EDGES: dict[str, Overrides] = {
    "sequential phase alone": {"objective.alpha_0": 0.0},
    "diffusion phase alone": {"objective.alpha_0": 1.0},
    "half of the samples cut short": {"data.ssl_ratio": 0.5},
    "wide heads, biases of queries, keys, values, scaled rope": SCALED,
}


def updates(run: Path, trained: Trained) -> dict[str, Tensor]:
    """Compute what the steps changed in every tensor of the model."""
    before = read_checkpoint(run / "checkpoints" / "step_00000000")
    after = read_checkpoint(trained.checkpoint)
    names = [name for name in after if not name.startswith(("optimizer.", "ema."))]
    return {name: after[name].double() - before[name].double() for name in names}


def run_case(
    world: World, folder: Path, data: Path, num_ranks: int, overrides: Overrides
) -> tuple[Trained, dict[str, Tensor]]:
    world.run(train_tiny, num_ranks, folder, data, overrides, 0)
    trained = world.run(train_tiny, num_ranks, folder, data, overrides, NUM_STEPS)[0]
    return trained, updates(folder, trained)


@pytest.fixture(scope="module")
def references(
    world: World, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Trained, dict[str, Tensor]]]:
    """Five steps of one rank, by objective."""
    return {
        name: run_case(world, tmp_path_factory.mktemp("one_rank"), tiny_data, 1, overrides)
        for name, overrides in OBJECTIVES.items()
    }


@pytest.mark.parametrize(
    ("objective", "case"),
    [
        *(("eso_lm", case) for case in CASES),
        *((objective, RICHEST) for objective in OBJECTIVES if objective != "eso_lm"),
        *(
            pytest.param(objective, case, marks=pytest.mark.soak)
            for objective in OBJECTIVES
            for case in CASES
            if objective != "eso_lm" and case != RICHEST
        ),
    ],
)
def test_five_steps_equal_one_ranks(
    objective: str,
    case: str,
    references: dict[str, tuple[Trained, dict[str, Tensor]]],
    world: World,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    num_ranks, overrides = CASES[case]
    overrides = overrides | OBJECTIVES[objective]
    expected, expected_updates = references[objective]
    trained, found_updates = run_case(world, tmp_path, tiny_data, num_ranks, overrides)
    assert trained.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
    assert trained.grad_norms == pytest.approx(expected.grad_norms, rel=LOSS_TOLERANCE)
    assert found_updates.keys() == expected_updates.keys()
    worst = 0.0
    for name, update in expected_updates.items():
        difference = (found_updates[name] - update).norm() / update.norm()
        worst = max(worst, float(difference))
        assert difference < UPDATE_TOLERANCE, name
    sizes = torch.stack([update.abs().mean() for update in expected_updates.values()])
    print(
        f"{case}: updates differ by {worst:.1e}, mean size {sizes.min():.1e} .. {sizes.max():.1e}"
    )


def test_steps_move_every_tensor(
    references: dict[str, tuple[Trained, dict[str, Tensor]]],
) -> None:
    for objective, (_, updates_of) in references.items():
        for name, update in updates_of.items():
            moved = (update != 0).double().mean()
            if "embedding" not in name and "output_layer" not in name:  # rows of rare tokens
                assert moved > NUM_PARAMETERS_MOVED, (objective, name)


@pytest.mark.parametrize("edge", EDGES)
def test_edges_train_on_every_layout(
    edge: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    """Check that every parameter takes part in every micro-batch, also where one phase trains."""
    expected = world.run(train_tiny, 1, tmp_path / "one", tiny_data, EDGES[edge], 2)[0]
    for number, overrides in enumerate((SMALL, LAYOUTS["TP=2 SP"][1], LAYOUTS["PP=2"][1])):
        run = tmp_path / str(number)
        found = world.run(train_tiny, 2, run, tiny_data, overrides | EDGES[edge], 2)[0]
        assert found.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
        assert found.grad_norms == pytest.approx(expected.grad_norms, rel=LOSS_TOLERANCE)
