"""Counts of rows, noise and orders of every objective, held to their definitions."""

import numpy as np
import pytest

from megatron_eso.batches.rows import MicroBatch
from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.config.sections import Vocabulary
from megatron_eso.objectives.build import build_objective
from megatron_eso.objectives.objective import Samples, Step
from megatron_eso.objectives.row_counts import RowCounts
from tests.support.planning import FAMILY, family_objective

MASK, LENGTH, NUM_SAMPLES = 9, 24, 600
# A sample of these sizes has no masked token with a smaller probability.
RARE = 1e-6


def count(batch: MicroBatch) -> RowCounts:
    rows = batch.rows
    pairs_R = rows.reads_4R[1] + rows.reads_4R[3]
    return RowCounts(
        rows=rows.num_rows,
        pairs=float(pairs_R.sum()),
        loss_rows=rows.num_loss_rows,
        loss_pairs=float(pairs_R[rows.loss_rows_E[: rows.num_loss_rows]].sum()),
    )


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *((name, {}) for name in FAMILY),
        ("bd3_lm", {"clip": (0.3, 0.8)}),
        ("bd3_lm", {"clip": (0.0, 0.5)}),
    ],
)
def test_expected_rows_are_the_mean_of_the_planned_rows(
    name: str, more: dict[str, tuple[float, float]]
) -> None:
    """Compare means over samples: five standard errors, and events that are rarer than a sample."""
    objective = family_objective(name, MASK, **more)
    step = Step(number=0, first_index=0, batch_size=NUM_SAMPLES)
    blank = Samples.blank(NUM_SAMPLES, LENGTH, MASK)
    phase_B = objective.plan(blank, step).phase_B
    counts: dict[int, list[RowCounts]] = {phase: [] for phase in range(len(objective.phases))}
    for index in range(NUM_SAMPLES):
        single = Samples(
            tokens_BT=blank.tokens_BT[:1],
            indices_B=np.array([index]),
            length_B=np.array([LENGTH]),
        )
        counts[int(phase_B[index])].append(count(objective.plan(single, step)))
    for phase, expected in enumerate(objective.expect_rows(LENGTH)):
        for field in ("rows", "pairs", "loss_rows", "loss_pairs"):
            values = np.array([getattr(each, field) for each in counts[phase]])
            error = values.std() / len(values) ** 0.5
            difference = abs(values.mean() - getattr(expected, field))
            assert difference < 5 * error + RARE * LENGTH**2, (phase, field)


@pytest.mark.parametrize("name", FAMILY)
def test_the_largest_plan_has_no_fewer_rows_than_any(name: str) -> None:
    objective = family_objective(name, MASK)
    step = Step(number=0, first_index=0, batch_size=40)
    batch = objective.plan(Samples.blank(40, LENGTH, MASK), step)
    largest = objective.plan_largest(batch.phase_B, LENGTH)
    for field in ("rows", "loss_rows"):
        assert getattr(count(batch), field) <= getattr(count(largest), field), field


@pytest.mark.parametrize("clip", [(0.3, 0.8), (0.5, 0.5), (1.0, 1.0), (0.001, 0.4), (0.45, 0.95)])
def test_a_clip_holds_times_and_masked_shares(clip: tuple[float, float]) -> None:
    """The law of the reference: a lower end of 1e-3 leaves blocks without masks."""
    section = ObjectiveConfig(name="bd3_lm", block_size=4, clip=clip)
    objective = build_objective(section, Vocabulary(size=10, mask_token_id=MASK), seed=5)
    step = Step(number=0, first_index=0, batch_size=50)
    loss = objective.plan(Samples.blank(50, LENGTH, MASK), step).loss
    batch = objective.plan(Samples.blank(50, LENGTH, MASK), step)
    positions = batch.rows.positions_R[batch.rows.loss_rows_E].numpy()
    is_masked_BT = np.zeros((50, LENGTH), dtype=np.bool_)
    is_masked_BT[loss.sample_E.numpy(), positions] = True
    shares = is_masked_BT.reshape(-1, 4).mean(axis=1)
    assert shares.max() <= clip[1]
    assert (shares.min() == 0) if clip[0] <= 1e-3 else (shares.min() >= clip[0])
    times = 1 / loss.elbo_weights_E.numpy()
    assert clip[0] - 1e-6 <= times.min()
    assert times.max() <= clip[1] + 1e-6
    assert (loss.weights_E == (1 if clip[0] > 0.5 else loss.elbo_weights_E)).all()


def test_times_of_blocks_are_stratified_over_the_step() -> None:
    """Every block has a stratum of its own, whatever the micro-batch that it comes in."""
    section = ObjectiveConfig(name="bd3_lm", block_size=4, clip=(0.75, 1.0))
    objective = build_objective(section, Vocabulary(size=10, mask_token_id=MASK), seed=5)
    step, num_blocks = Step(number=2, first_index=32, batch_size=16), 16 * LENGTH // 4
    times = []
    for start in range(0, 16, 4):
        samples = Samples(
            tokens_BT=np.zeros((4, LENGTH), dtype=np.int64),
            indices_B=32 + start + np.arange(4),
            length_B=np.full(4, LENGTH),
        )
        batch = objective.plan(samples, step)
        blocks = batch.rows.positions_R[batch.rows.loss_rows_E] // 4
        keys = batch.loss.sample_E * 100 + blocks
        for key in keys.unique():
            times.append(1 / float(batch.loss.elbo_weights_E[keys == key][0]))
    strata = np.floor((np.array(times) - 0.75) / 0.25 * num_blocks + 1e-4).astype(int)
    assert sorted(strata.tolist()) == list(range(num_blocks))
