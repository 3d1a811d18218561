"""Every objective compared with whole texts under dense masks: losses and gradients, in float64."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_eso.batches.rows import MicroBatch
from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.config.sections import Vocabulary
from megatron_eso.model.attention_backend import BACKENDS
from megatron_eso.objectives.bd3_lm import Bd3LmObjective
from megatron_eso.objectives.build import build_objective
from megatron_eso.objectives.eso_lm import EsoLmObjective
from megatron_eso.objectives.mdlm import MdlmObjective
from megatron_eso.objectives.noise.blocks import BlockNoise
from megatron_eso.objectives.noise.slots import Noise
from megatron_eso.objectives.objective import Objective, Samples, Step
from tests.support.dense_family import dense_losses, positions_of
from tests.support.dense_oracle import (
    OracleConfig,
    Parameters,
    draw_parameters,
    gradients,
    row_losses,
)
from tests.support.planning import FAMILY, family_objective

HIDDEN, VOCAB, MASK, EOS = 16, 11, 10, 0
STEP = Step(number=3, first_index=40, batch_size=6)
# Both sides are float64 sums of the same terms in another order.
TOLERANCE = 1e-10


def build_model(num_layers: int, num_groups: int) -> tuple[OracleConfig, Parameters]:
    config = OracleConfig(
        num_layers=num_layers, num_heads=4, num_groups=num_groups, mask_token_id=MASK
    )
    return config, draw_parameters(config, hidden_size=HIDDEN, vocab_size=VOCAB)


def draw_samples(length: int, *, cut: bool, documents: bool) -> Samples:
    """Draw six samples; the first holds empty documents, the last has no EOS token."""
    draw = np.random.default_rng(length)
    tokens_BT = draw.integers(1 - documents, MASK, (6, length))
    tokens_BT[0, :3] = EOS
    tokens_BT[5][tokens_BT[5] == EOS] = 1
    length_B = np.minimum([length, 1, 2, length // 2 + 1, length, length], length)
    is_end_BT = tokens_BT == EOS
    return Samples(
        tokens_BT=tokens_BT,
        indices_B=STEP.first_index + np.arange(6),
        length_B=length_B if cut else np.full(6, length),
        documents_BT=np.cumsum(is_end_BT, axis=1) - is_end_BT if documents else None,
    )


def assert_agrees(name: str, batch: MicroBatch, samples: Samples, **model: Any) -> None:
    """Compare the loss of every predicted token, and the gradients of their weighted sum."""
    config, parameters = build_model(**model)
    loss_rows, real = batch.loss, slice(batch.loss.num_real)
    nll = row_losses(parameters, config, batch, BACKENDS["torch"]())[real]
    chosen = dense_losses(FAMILY[name], parameters, config, batch, samples)
    assert (nll - chosen).abs().max() < TOLERANCE
    # The gradients.
    weights = loss_rows.weights_E[real].double()
    found, dense = (gradients((weights * x).sum(), parameters) for x in (nll, chosen))
    assert max((found[n] - dense[n]).abs().max().item() for n in parameters) < 10 * TOLERANCE
    assert max(x.abs().max().item() for x in dense.values()) > 1e-3


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("length", [5, 14])
@pytest.mark.parametrize("name", FAMILY)
def test_rows_give_the_losses_and_gradients_of_dense_masks(
    name: str, length: int, cut: bool, documents: bool
) -> None:
    if name == "ar none" and documents:
        pytest.skip("refused by the configuration")
    samples = draw_samples(length, cut=cut, documents=documents)
    batch = family_objective(name, MASK, seed=4).plan(samples, STEP).pad(4, MASK)
    assert_agrees(name, batch, samples, num_layers=2 + cut, num_groups=2)


@pytest.mark.parametrize("masked", ["none", "all", "one", "all but one", "last", "first"])
@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("name", ["mdlm", "bd3_lm", "eso_lm a", "eso_lm next"])
def test_edge_cases_agree(name: str, length: int, masked: str) -> None:
    """Plan given masks, each for a sample of the diffusion and of the sequential phase."""
    # Two samples with the same masks.
    position = np.arange(length)
    is_masked_T = {
        "none": position < 0,
        "all": position >= 0,
        "one": position == length // 2,
        "all but one": position != length // 2,
        "last": position == length - 1,
        "first": position == 0,
    }[masked]
    is_masked_BT = np.tile(is_masked_T, (2, 1))
    samples = Samples(
        tokens_BT=np.random.default_rng(length).integers(0, MASK, (2, length)),
        indices_B=np.arange(2),
        length_B=np.full(2, length),
    )
    # Plan them with these masks.
    objective = family_objective(name, MASK)
    if isinstance(objective, Bd3LmObjective):
        t_BT = np.full((2, length), 0.5)
        batch = objective.plan_noise(samples, BlockNoise(is_masked_BT=is_masked_BT, t_BT=t_BT))
    else:
        assert isinstance(objective, EsoLmObjective | MdlmObjective)
        slots_T = np.concatenate([np.flatnonzero(~is_masked_T)[::-1], np.flatnonzero(is_masked_T)])
        noise = Noise(
            length_B=samples.length_B,
            is_masked_BT=is_masked_BT,
            permutation_BT=np.tile(slots_T, (2, 1)),
            t_B=np.array([0.5, 0.5 if name == "mdlm" else np.nan]),
            is_sequential_B=np.array([False, name != "mdlm"]),
        )
        batch = objective.plan_noise(samples, noise)
    # Without a mask there are no rows.
    if is_masked_T.any():
        assert_agrees(name, batch.pad(4, MASK), samples, num_layers=2, num_groups=1)
    else:
        assert batch.rows.num_rows == batch.loss.num_real == 0


def plan_losses(
    batch: MicroBatch, *, next_after: int | None = None
) -> dict[tuple[int, int], float]:
    """Return the weighted loss of each predicted token, by sample and position."""
    config, parameters = build_model(2, 2)
    real = slice(batch.loss.num_real)
    nll = row_losses(parameters, config, batch, BACKENDS["torch"]())[real].detach()
    weighted = nll * batch.loss.weights_E[real].double()
    keys = positions_of(batch, next_after=next_after)
    return dict(zip(keys, weighted.tolist(), strict=True))


def test_three_objectives_are_one_computation() -> None:
    """Compare BD3-LM with blocks of one masked token, Set Diffusion by sets of one, and Eso-LM."""
    samples = draw_samples(9, cut=True, documents=False)
    vocabulary = Vocabulary(size=VOCAB, mask_token_id=MASK)

    def build(**settings: Any) -> Objective:
        return build_objective(ObjectiveConfig(**settings), vocabulary, seed=1)

    blocks = build(name="bd3_lm", block_size=1, clip=(1.0, 1.0))
    sets = build(name="set_dlm", set_size=1, max_set_size=1)
    eso_lm = build(name="eso_lm", alpha_0=0.0)
    found = [plan_losses(each.plan(samples, STEP)) for each in (blocks, sets, eso_lm)]
    assert found[0].keys() == found[1].keys() == found[2].keys()
    for key, loss in found[0].items():
        assert abs(loss - found[1][key]) < TOLERANCE
        assert abs(loss - found[2][key]) < TOLERANCE
    # A row of AR predicts the next token from the token before: another computation.
    ar = plan_losses(build(name="ar").plan(samples, STEP))
    assert max(abs(ar[key] - loss) for key, loss in found[0].items()) > 0.1


def test_next_token_rows_without_a_diffusion_phase_are_ar() -> None:
    """Compare all tokens but the first with AR's; both predict the first from the mask token."""
    samples = draw_samples(9, cut=True, documents=False)
    vocabulary = Vocabulary(size=VOCAB, mask_token_id=MASK)

    def plan(**settings: Any) -> MicroBatch:
        objective = build_objective(ObjectiveConfig(**settings), vocabulary, seed=1)
        return objective.plan(samples, STEP)

    batch = plan(alpha_0=0.0, sequential_prediction="next")
    found = plan_losses(batch, next_after=MASK)
    prepended = plan_losses(plan(name="ar"))
    for key, loss in plan_losses(plan(name="ar", prepend_token="none")).items():
        assert abs(found.pop(key) - loss) < TOLERANCE
    # Each sample has one query, that of the first token.
    assert batch.rows.num_rows == sum(samples.length_B)
    assert {position for _, position in found} == {0}
    assert all(abs(loss - prepended[key]) < TOLERANCE for key, loss in found.items())


def test_one_block_is_mdlm() -> None:
    """Give BD3-LM with one block MDLM's times and masks."""
    samples = draw_samples(9, cut=False, documents=False)
    vocabulary = Vocabulary(size=VOCAB, mask_token_id=MASK)
    mdlm = family_objective("mdlm", MASK)
    block = build_objective(ObjectiveConfig(name="bd3_lm", block_size=9), vocabulary, seed=1)
    assert isinstance(mdlm, MdlmObjective)
    assert isinstance(block, Bd3LmObjective)
    times_B = np.linspace(0.2, 1, 6)
    is_masked_BT = np.random.default_rng(0).random((6, 9)) < times_B[:, None]
    noise = Noise(
        length_B=samples.length_B,
        is_masked_BT=is_masked_BT,
        permutation_BT=np.tile(np.arange(9), (6, 1)),
        t_B=times_B,
        is_sequential_B=np.zeros(6, dtype=np.bool_),
    )
    expected = plan_losses(mdlm.plan_noise(samples, noise))
    t_BT = np.repeat(times_B[:, None], 9, axis=1)
    found = plan_losses(block.plan_noise(samples, BlockNoise(is_masked_BT=is_masked_BT, t_BT=t_BT)))
    assert found.keys() == expected.keys()
    assert max(abs(loss - expected[key]) for key, loss in found.items()) < 1e-6  # float32 weights


def test_unclipped_blocks_of_one_token_have_the_exact_likelihood_in_the_mean() -> None:
    """Average the bound over many draws of times and masks; compare with every token masked.

    A token has the loss l / t with probability t, else 0, t uniform in [eps, 1]: the mean is l, and
    the variance of a draw is l^2 (log(1 / eps) - 1). The sum over tokens of N draws has a standard
    error of at most sqrt(sum(l^2) log(1 / eps) / N); stratified times make it smaller.
    """
    samples = draw_samples(9, cut=False, documents=False)
    vocabulary = Vocabulary(size=VOCAB, mask_token_id=MASK)
    section = ObjectiveConfig(name="bd3_lm", block_size=1)
    objective = build_objective(section, vocabulary, seed=1)
    exact = plan_losses(objective.plan_validation(samples, 1000))
    num_draws, total = 1500, 0.0
    for number in range(num_draws):
        indices = samples.indices_B + 6 * number
        step = Step(number=number, first_index=int(indices[0]), batch_size=6)
        drawn = replace(samples, indices_B=indices)
        loss = objective.plan(drawn, step).loss
        keys = positions_of(objective.plan(drawn, step))
        total += sum(
            exact[key] * weight for key, weight in zip(keys, loss.weights_E.tolist(), strict=False)
        )
    error = (sum(x**2 for x in exact.values()) * np.log(1e3) / num_draws) ** 0.5
    assert abs(total / num_draws - sum(exact.values())) < 5 * error
