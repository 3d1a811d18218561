"""The warm start: which samples are AR rows, and that each has the rows of its objective."""

import numpy as np
import pytest
import torch

from megatron_eso.batches.dealing import Dealing
from megatron_eso.batches.rows import MicroBatch
from megatron_eso.objectives.eso_lm import EsoLmObjective
from megatron_eso.objectives.objective import Samples, Step
from tests.support.planning import FAMILY, WARM, eso_lm, family_objective

MASK, LENGTH, SIZE = 9, 12, 16


def step_of(number: int) -> Step:
    return Step(number=number, first_index=number * SIZE, batch_size=SIZE)


def samples_of(step: Step) -> Samples:
    tokens_BT = np.random.default_rng(step.number).integers(0, MASK, (SIZE, LENGTH))
    return Samples(
        tokens_BT=tokens_BT,
        indices_B=step.first_index + np.arange(SIZE),
        length_B=np.full(SIZE, LENGTH),
    )


OTHERS = [name for name in FAMILY if not name.startswith("ar")]


@pytest.mark.parametrize("name", OTHERS)
def test_the_share_of_next_token_prediction_falls_from_one_to_zero(name: str) -> None:
    objective = family_objective(name, MASK, **WARM)
    ar = len(objective.phases) - 1
    assert objective.phases[ar].name == "ar"
    counts = [int((objective.assign_phases(step_of(n)) == ar).sum()) for n in range(12)]
    assert counts[0] == SIZE
    assert counts[10:] == [0, 0]
    assert counts == sorted(counts, reverse=True)
    # Each phase of the objective keeps its part of what is left, within a sample.
    for number in range(11):
        phase_N = objective.assign_phases(step_of(number))
        for phase in objective.phases[:ar]:
            left = (phase_N == objective.phases.index(phase)).sum()
            assert abs(left - phase.share * SIZE * number / 10) <= 1


@pytest.mark.parametrize("prediction", ["own", "next"])
def test_alpha_0_rises_to_its_value_in_training_alone(prediction: str) -> None:
    """At step n of N the masks and weights are those of a run at `alpha_0 n / N`."""

    def build(alpha_0: float, **settings: int) -> EsoLmObjective:
        return eso_lm(MASK, alpha_0=alpha_0, sequential_prediction=prediction, **settings)

    rising = build(0.5, alpha_0_warmup_steps=4, batch_split=0.5)
    for number, alpha_0 in ((1, 0.125), (2, 0.25), (4, 0.5), (9, 0.5)):
        step = step_of(number)
        assert_same(
            rising.plan(samples_of(step), step), build(alpha_0).plan(samples_of(step), step)
        )
    samples = samples_of(step_of(0))
    assert_same(rising.plan_validation(samples, SIZE), build(0.5).plan_validation(samples, SIZE))
    # The first step masks every token, and the diffusion phase has no weight yet.
    loss = rising.plan(samples, step_of(0)).loss
    assert loss.num_real == SIZE * LENGTH
    assert (loss.weights_E == loss.phase_E).all()


def assert_same(found: MicroBatch, expected: MicroBatch) -> None:
    assert found.rows.spans == expected.rows.spans
    assert torch.equal(found.rows.tokens_R, expected.rows.tokens_R)
    assert torch.equal(found.loss.targets_E, expected.loss.targets_E)
    assert torch.equal(found.loss.weights_E, expected.loss.weights_E)


def test_ranks_get_equal_shares() -> None:
    objective = family_objective("eso_lm", MASK, **WARM)
    dealing = Dealing(SIZE, 2, 2, 0.5)
    for number in range(11):
        is_ar = objective.assign_phases(step_of(number)) == 2
        shares = [is_ar[np.concatenate(dealing.micro_batches(rank))].sum() for rank in (0, 1)]
        assert abs(shares[0] - shares[1]) <= 2


@pytest.mark.parametrize("number", [0, 3, 9, 10])
@pytest.mark.parametrize("name", OTHERS)
def test_every_sample_has_the_rows_of_its_objective(name: str, number: int) -> None:
    """Plan each sample alone, and find its targets, weights and reads in the joined plan."""
    # Plan all samples together, with the AR loss for some.
    step = step_of(number)
    samples, warm = samples_of(step), family_objective(name, MASK, **WARM)
    alone, ar = family_objective(name, MASK), family_objective("ar", MASK)
    batch = warm.plan(samples, step)
    is_ar_B = warm.assign_phases(step) == len(alone.phases)
    assert (batch.phase_B == warm.assign_phases(step)).all()
    # Compare each sample with its plan alone: targets, weights, and the rows that it reads.
    for b in range(SIZE):
        single = samples.choose(np.array([b]))
        expected = (ar if is_ar_B[b] else alone).plan(single, step)
        real = slice(expected.loss.num_real)
        found = batch.loss.sample_E[: batch.loss.num_real] == b
        rows = batch.rows.loss_rows_E[: batch.loss.num_real][found]
        expected_rows = expected.rows.loss_rows_E[real]
        assert (
            batch.loss.targets_E[: batch.loss.num_real][found] == expected.loss.targets_E[real]
        ).all()
        weights = batch.loss.elbo_weights_E[: batch.loss.num_real][found]
        assert (weights == (0 if is_ar_B[b] else expected.loss.elbo_weights_E[real])).all()
        for each, own in zip(rows.tolist(), expected_rows.tolist(), strict=True):
            a, b_reads = batch.rows.reads_4R[:, each], expected.rows.reads_4R[:, own]
            for first, count in ((0, 1), (2, 3)):
                assert a[count] == b_reads[count]
                here = slice(int(a[first]), int(a[first] + a[count]))
                there = slice(int(b_reads[first]), int(b_reads[first] + b_reads[count]))
                for name_ in ("tokens_R", "positions_R"):
                    read = getattr(batch.rows, name_)[here]
                    assert (read == getattr(expected.rows, name_)[there]).all()
