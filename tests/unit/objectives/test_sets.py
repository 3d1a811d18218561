"""Sets of tokens predicted at once, held to whole texts under dense masks."""

import numpy as np
import pytest
import torch

from megatron_eso.batches.rows import MicroBatch
from megatron_eso.batches.sets import predict_in_sets
from megatron_eso.model.attention_backend import BACKENDS
from megatron_eso.objectives.objective import Samples
from tests.support.dense_oracle import (
    OracleConfig,
    dense_logits,
    draw_parameters,
    row_losses,
    token_losses,
)
from tests.support.planning import family_objective

MASK, LENGTH = 10, 14
CONFIG = OracleConfig(num_layers=3, num_heads=4, num_groups=2, mask_token_id=MASK)
PARAMETERS = draw_parameters(CONFIG, hidden_size=16, vocab_size=MASK + 1)
# Both sides are float64 sums of the same terms in another order.
TOLERANCE = 1e-10
QUERIED = ("eso_lm", "eso_lm a", "eso_lm uniform", "set_dlm", "any_order_ar")
"""Objectives of which a query predicts each token of an order."""


def draw_samples(*, documents: bool = False) -> Samples:
    """Draw three samples; with documents, of 5, 1 and 8 tokens."""
    documents_T = np.repeat([0, 1, 2], [5, 1, 8])
    return Samples(
        tokens_BT=np.random.default_rng(3).integers(0, MASK, (3, LENGTH)),
        indices_B=np.arange(3),
        length_B=np.full(3, LENGTH),
        documents_BT=np.tile(documents_T, (3, 1)) if documents else None,
    )


def losses_of(batch: MicroBatch) -> torch.Tensor:
    nll = row_losses(PARAMETERS, CONFIG, batch.pad(4, MASK), BACKENDS["torch"]())
    return nll[: batch.loss.num_real]


def dense_losses(
    batch: MicroBatch, samples: Samples, set_size: int, *, reads_masks: bool
) -> torch.Tensor:
    """Return `-log p` of each query, from each stream with its queries under a dense mask."""
    real = slice(batch.loss.num_real)
    positions = batch.rows.positions_R[batch.rows.loss_rows_E][real].numpy()
    sample_E = batch.loss.sample_E[real].numpy()
    documents_BT = samples.documents_BT
    if documents_BT is None:
        documents_BT = np.zeros_like(samples.tokens_BT)
    stream_E = sample_E * LENGTH + documents_BT[sample_E, positions]
    losses = torch.zeros(len(positions), dtype=torch.float64)
    for stream in np.unique(stream_E):
        chosen = np.flatnonzero(stream_E == stream)
        order = torch.from_numpy(positions[chosen])
        tokens = torch.from_numpy(samples.tokens_BT[sample_E[chosen[0]]])[order]
        slots = torch.arange(len(order))
        earlier = slots[:, None] // set_size > slots // set_size
        own, clean = slots[:, None] == slots, slots[:, None] >= slots
        if reads_masks:
            own = clean & (slots[:, None] // set_size == slots // set_size)
        mask = torch.cat(
            [torch.cat([own, earlier], 1), torch.cat([torch.zeros_like(own), clean], 1)]
        )
        row_tokens = torch.cat([torch.full_like(tokens, MASK), tokens])
        logits = dense_logits(PARAMETERS, CONFIG, row_tokens[None], order.repeat(2)[None], mask)
        found = token_losses(logits[:, : len(order)], tokens[None], MASK)[0]
        losses[torch.from_numpy(chosen)] = found.detach()
    return losses


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("reads_masks", [False, True])
@pytest.mark.parametrize("set_size", [1, 2, 3, 8, LENGTH, 2 * LENGTH])
@pytest.mark.parametrize("name", QUERIED)
def test_a_query_reads_earlier_sets(
    name: str, set_size: int, reads_masks: bool, documents: bool
) -> None:
    samples = draw_samples(documents=documents)
    plan = family_objective(name, MASK).plan_order(samples, 0)
    found = losses_of(predict_in_sets(plan, set_size, reads_masks=reads_masks))
    expected = dense_losses(plan, samples, set_size, reads_masks=reads_masks)
    assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("reads_masks", [False, True])
def test_sets_of_one_token_are_the_exact_likelihood(reads_masks: bool) -> None:
    plan = family_objective("any_order_ar", MASK).plan_order(draw_samples(), 0)
    in_sets = losses_of(predict_in_sets(plan, 1, reads_masks=reads_masks))
    assert (in_sets - losses_of(plan)).abs().max() < TOLERANCE


def test_in_one_set_every_token_is_predicted_from_nothing() -> None:
    samples = draw_samples()
    plan = family_objective("eso_lm", MASK).plan_order(samples, 0)
    for position, found, target in zip(
        plan.rows.positions_R[plan.rows.loss_rows_E].tolist(),
        losses_of(predict_in_sets(plan, LENGTH, reads_masks=False)).tolist(),
        plan.loss.targets_E,
        strict=True,
    ):
        alone = torch.tensor([[MASK]]), torch.tensor([[position]])
        logits = dense_logits(PARAMETERS, CONFIG, *alone, torch.ones(1, 1, dtype=torch.bool))
        assert abs(found - float(token_losses(logits, target[None, None], MASK))) < TOLERANCE
