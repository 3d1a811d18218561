"""Scores equal those of one plain causal pass per slot, and probabilities sum to one."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from megatron_eso.sampler import EsoLM

EXACT = 1e-10
"""For float64; the two ways sum in different orders."""

MASK = 3


def random_batch(num_samples: int, num_slots: int) -> tuple[Tensor, Tensor]:
    """Draw texts without the mask token, and orders."""
    generator = torch.Generator().manual_seed(num_slots)
    x = torch.randint(0, 10, (num_samples, num_slots), generator=generator)
    order = torch.rand(num_samples, num_slots, generator=generator).argsort(1)
    return torch.where(x == MASK, 10, x), order


def mask_slots(x: Tensor, order: Tensor, num_clean: list[int]) -> Tensor:
    slots = torch.arange(x.shape[1])
    is_masked_slot = slots >= torch.tensor(num_clean)[:, None]
    return x.masked_fill(torch.zeros_like(is_masked_slot).scatter(1, order, is_masked_slot), MASK)


def logits_of_last(model: EsoLM, tokens: list[int], positions: list[int]) -> Tensor:
    """Return the last row of a plain causal pass."""
    hidden = model.network.hidden_states(torch.tensor([tokens]), torch.tensor([positions]))
    return model.network.logits(hidden)[0, -1]


def test_a_masked_slot_of_the_sequential_phase_reads_the_clean_slots_before_it(
    model: EsoLM,
) -> None:
    x, order = random_batch(4, 7)
    num_clean = [0, 1, 4, 7]
    logits = model.sequential_logits(mask_slots(x, order, num_clean), x, order)
    for sample, slot in itertools.product(range(4), range(7)):
        if slot < num_clean[sample]:
            assert not logits[sample, slot].any()
            continue
        positions = order[sample, : slot + 1].tolist()
        tokens = [*x[sample, positions[:-1]].tolist(), MASK]
        expected = logits_of_last(model, tokens, positions)
        torch.testing.assert_close(logits[sample, slot], expected, atol=EXACT, rtol=0)


def test_a_slot_of_the_diffusion_phase_reads_the_slots_before_it(model: EsoLM) -> None:
    x, order = random_batch(4, 7)
    z = mask_slots(x, order, [0, 1, 4, 7])
    logits = model.diffusion_logits(z, order)
    for sample, slot in itertools.product(range(4), range(7)):
        positions = order[sample, : slot + 1].tolist()
        expected = logits_of_last(model, z[sample, positions].tolist(), positions)
        torch.testing.assert_close(logits[sample, slot], expected, atol=EXACT, rtol=0)


def test_the_log_likelihood_is_the_sum_over_slots(model: EsoLM) -> None:
    x, order = random_batch(2, 6)
    found = model.log_likelihood(x, order)
    for sample in range(2):
        total = 0.0
        for slot in range(6):
            positions = order[sample, : slot + 1].tolist()
            tokens = x[sample, positions].tolist()
            logits = logits_of_last(model, [*tokens[:-1], MASK], positions).clone()
            logits[MASK] = -torch.inf
            total += float(logits.log_softmax(0)[tokens[-1]])
        assert float(found[sample]) == pytest.approx(total, abs=EXACT)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_probabilities_of_all_texts_sum_to_one(make, order: list[int]) -> None:
    model = make(vocab_size=4)
    texts = torch.tensor(list(itertools.product(range(3), repeat=3)))
    orders = torch.tensor([order]).expand_as(texts).contiguous()
    assert float(model.log_likelihood(texts, orders).exp().sum()) == pytest.approx(1, abs=EXACT)


def test_the_mask_token_has_no_probability(make) -> None:
    model = make()
    x, order = random_batch(1, 4)
    x[0, 2] = MASK
    assert float(model.log_likelihood(x, order)) == -math.inf


def test_samples_of_a_batch_are_independent(model: EsoLM) -> None:
    x, order = random_batch(4, 6)
    z = mask_slots(x, order, [0, 2, 6, 3])
    shuffled = [2, 0, 3, 1]
    for found, again in (
        (model.diffusion_logits(z, order), model.diffusion_logits(z[shuffled], order[shuffled])),
        (
            model.sequential_logits(z, x, order),
            model.sequential_logits(z[shuffled], x[shuffled], order[shuffled]),
        ),
    ):
        torch.testing.assert_close(found[shuffled], again, atol=EXACT, rtol=0)


def test_gradients_flow_through_the_network(make) -> None:
    network = make().network.requires_grad_(True)
    x, order = random_batch(2, 5)
    network.sequential_logits(mask_slots(x, order, [1, 2]), x, order).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_logits_have_at_least_float32(make, dtype: torch.dtype, expected: torch.dtype) -> None:
    model, oracle = make(dtype), make()
    x, order = random_batch(2, 5)
    z = mask_slots(x, order, [1, 3])
    logits = model.diffusion_logits(z, order)
    assert logits.dtype == expected
    tolerance = 60 * torch.finfo(dtype).eps
    assert (logits - oracle.diffusion_logits(z, order)).abs().max() < tolerance


def test_inputs_that_do_not_fit_are_refused(make) -> None:
    model = make()
    x, order = random_batch(2, 6)
    z = mask_slots(x, order, [2, 3])
    wide_x, wide_order = random_batch(1, 13)
    wrong = order.clone()
    wrong[0, 0] = wrong[0, 1]
    swapped = order.flip(1)
    # Both phases check their arguments.
    cases = [
        (z, x, swapped, "masked token comes before a clean one"),
        (wide_x, wide_x, wide_order, "max_length = 12"),
        (z[:, :5], x, order, "shape"),
        (z, x, order[0], "shape"),
        (z.int(), x, order, "int32"),
        (z, x, wrong, "positions 0..T-1 once"),
        (z, x, order + 1, "positions 0..T-1 once"),
        (z.masked_fill(z != MASK, 11), x, order, "outside 0..10"),
        (z.masked_fill(z != MASK, -1), x, order, "outside 0..10"),
    ]
    for bad_z, bad_x, bad_order, message in cases:
        with pytest.raises(ValueError, match=message):
            model.diffusion_logits(bad_z, bad_order)
        with pytest.raises(ValueError, match=message):
            model.sequential_logits(bad_z, bad_x, bad_order)
    # Each phase has a condition of its own.
    with pytest.raises(ValueError, match="differ"):
        model.sequential_logits(z, (x + 1) % 3, order)
    with pytest.raises(ValueError, match="max_length"):
        model.log_likelihood(wide_x, wide_order)
