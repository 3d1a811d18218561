"""The samples of each objective have the distribution that an exact enumeration gives.

A network of 3 tokens and the mask generates texts of 3 positions: 27 texts. Their exact
probabilities are sums over all orders, or over all steps in which the tokens can be revealed. Each
step's logits come from a full forward pass.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_eso.objectives.noise.schedule import LogLinearSchedule
from megatron_eso.sampler.objectives.model import SamplerModel
from megatron_eso.sampler.steps.ordering import plan_ancestral
from tests.support.recomputed_logits import make_sampler, recompute

LEVEL = 1e-3
"""Level of each test: a correct sampler with another seed fails with this probability."""
CRITICAL = {26: 54.05, 8: 26.12}
"""Upper `LEVEL` point of the chi-square distribution, by degrees of freedom."""
N = 6000
T, V, MASK = 3, 4, 3
TEXTS = torch.tensor(list(itertools.product(range(3), repeat=T)))
ORDERS = list(itertools.permutations(range(T)))
Way = tuple[float, list[int], list[int]]
"""Probability, order and schedule of one way to generate a text."""


def enumerate_texts(model: SamplerModel, ways: Iterator[Way], num_random: int) -> Tensor:
    """Compute the probability of each text, as the mean over the ways to generate it."""
    total = torch.zeros(len(TEXTS), dtype=torch.float64)
    for probability, order, schedule in ways:
        order_BT = torch.tensor([order]).expand_as(TEXTS).contiguous()
        logs, slot = torch.zeros(len(TEXTS), dtype=torch.float64), T - sum(schedule)
        for count in schedule:
            tokens = TEXTS.scatter(1, order_BT[:, slot:], MASK)
            logits = recompute(model, tokens, order_BT, num_random)
            logits[..., MASK] = -torch.inf
            revealed = order_BT[:, slot : slot + count]
            targets = TEXTS.gather(1, revealed)[..., None]
            log_p = logits[:, slot : slot + count].log_softmax(-1).gather(2, targets)
            logs += log_p.sum((1, 2))
            slot += count
        total += probability * logs.exp()
    return total


def all_orders(*schedule: int) -> Iterator[Way]:
    return ((1 / len(ORDERS), list(order), list(schedule)) for order in ORDERS)


def left_to_right() -> Iterator[Way]:
    yield 1.0, [0, 1, 2], [1, 1, 1]


def sorted_after(num_random: int) -> Iterator[Way]:
    """Yield random orders that are left to right from a slot on."""
    for order in ORDERS:
        sorted_order = [*order[:num_random], *sorted(order[num_random:])]
        yield 1 / len(ORDERS), sorted_order, [1] * T


def ancestral_blocks(block_size: int, steps: int) -> Iterator[Way]:
    """Yield the ways of ancestral diffusion: each token of a block has a step of its own.

    At alpha_t = 1 - (1 - 1e-3) t a masked token stays masked from t to s with the probability
    `(1 - alpha_s) / (1 - alpha_t)`.
    """
    alphas = LogLinearSchedule(1.0).alpha(np.linspace(1, 0, steps + 1))
    stays = (1 - alphas[1:]) / (1 - alphas[:-1])
    in_step = [float(np.prod(stays[:i]) * (1 - stays[i])) for i in range(steps)]
    for assigned in itertools.product(range(steps), repeat=T):
        groups = [(position // block_size, assigned[position]) for position in range(T)]
        order = sorted(range(T), key=lambda position: groups[position])
        counts = [groups.count(group) for group in sorted(set(groups))]
        yield float(np.prod([in_step[step] for step in assigned])), order, counts


def drawn(model: SamplerModel, seed: int, steps: int) -> Iterator[Way]:
    """Yield the orders and sets that the samples have, since no closed form gives their law."""
    out = model.generate(N, length=T, steps=steps, seed=seed)
    pairs = zip(out.permutation.tolist(), out.schedule, strict=True)
    ways: dict[tuple[Any, ...], int] = {}
    for order, schedule in pairs:
        way = (tuple(order), tuple(schedule))  # type: ignore[arg-type]
        ways[way] = ways.get(way, 0) + 1
    return ((count / N, list(o), list(s)) for (o, s), count in ways.items())


def chi_square(sequences: Tensor, expected: Tensor) -> float:
    """Return the chi-square statistic of samples against the probabilities of the 27 texts."""
    counts = torch.bincount(sequences @ torch.tensor([9, 3, 1]), minlength=27)
    wanted = N * expected
    assert float(wanted.sum()) == pytest.approx(N)
    assert float(wanted[wanted > 0].min()) > 5
    return float(((counts - wanted).square() / wanted)[wanted > 0].sum())


CASES: dict[str, tuple[str, dict[str, Any], Any, int]] = {
    "eso_lm_b, a diffusion step of two": (
        *("eso_lm_b", {"schedule": [2, 1], "alpha_0": 2 / 3}),
        *(lambda model: all_orders(2, 1), 2),
    ),
    "eso_lm_next, both phases": (
        *("eso_lm_next", {"schedule": [1, 1, 1], "alpha_0": 1 / 3}),
        *(lambda model: sorted_after(1), 1),
    ),
    "eso_lm_next, sequential alone": (
        *("eso_lm_next", {"schedule": [1, 1, 1], "alpha_0": 0.0}),
        *(lambda model: left_to_right(), 0),
    ),
    "eso_lm_a, diffusion alone": (
        *("eso_lm_a", {"schedule": [1, 2], "alpha_0": 1.0}),
        *(lambda model: all_orders(1, 2), 3),
    ),
    "eso_lm_a, both phases": (
        *("eso_lm_a", {"schedule": [1, 1, 1], "alpha_0": 2 / 3}),
        *(lambda model: all_orders(1, 1, 1), 2),
    ),
    "mdlm": ("mdlm", {"steps": 2}, lambda model: ancestral_blocks(T, 2), 0),
    "mdlm, many steps": ("mdlm", {"steps": 5}, lambda model: ancestral_blocks(T, 5), 0),
    "bd3_lm": ("bd3_lm_2", {"steps": 2}, lambda model: ancestral_blocks(2, 2), 0),
    "ar_mask": ("ar_mask", {}, lambda model: left_to_right(), 0),
    "ar_bos": ("ar_bos", {}, lambda model: left_to_right(), 0),
    "any_order_ar": ("any_order_ar", {}, lambda model: all_orders(1, 1, 1), 0),
    "set_dlm": ("set_dlm_3", {"steps": 2}, lambda model: drawn(model, 5, 2), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_samples_have_the_exact_distribution(name: str) -> None:
    case, options, list_ways, num_random = CASES[name]
    model = make_small(case)
    expected = enumerate_texts(model, list_ways(model), num_random)
    out = model.generate(N, length=T, seed=5, **options)
    assert chi_square(out.sequences, expected) < CRITICAL[26]
    # The test has power: the uniform distribution is refused.
    assert chi_square(out.sequences, torch.full((27,), 1 / 27, dtype=torch.float64)) > 100


@pytest.mark.parametrize("case", ["eso_lm_a", "eso_lm_b", "eso_lm_next"])
def test_samples_of_the_ancestral_schedule_have_the_exact_distribution(case: str) -> None:
    """The samples of a batch share the schedule of its seed, so batches are many."""
    model: Any = make_small(case)
    known: dict[tuple[int, ...], Tensor] = {}
    expected = torch.zeros(len(TEXTS), dtype=torch.float64)
    sequences, num_batches = [], 60
    for seed in range(num_batches):
        schedule, num_random = plan_ancestral(seed, T, 0, model.alpha_0, 2)
        key = (*schedule, num_random)
        if key not in known:
            ways = (
                (1 / len(ORDERS), [*order[:num_random], *sorted(order[num_random:])], schedule)
                for order in ORDERS
            )
            known[key] = enumerate_texts(model, ways, num_random)
        expected += known[key] / num_batches
        sequences.append(model.generate(N // num_batches, length=T, steps=2, seed=seed).sequences)
    assert len(known) > 4
    assert chi_square(torch.cat(sequences), expected) < CRITICAL[26]


def test_ar_without_a_prepended_token_continues_a_prompt_by_the_exact_distribution() -> None:
    model = make_small("ar_none")
    prompt = torch.tensor([[2, MASK, MASK]]).expand(N, T)
    expected = enumerate_texts(model, iter([(1.0, [0, 1, 2], [1, 1])]), 0)
    expected = expected.where(TEXTS[:, 0] == 2, 0)
    out = model.generate(N, prompt=prompt, seed=5)
    assert chi_square(out.sequences, expected) < CRITICAL[8]


def make_small(case: str) -> SamplerModel:
    """Make a model of 3 tokens and the mask, whose texts all have a fair probability."""
    sizes = {"vocab_size": V, "mask_token_id": MASK}
    base = case.removesuffix("_2").removesuffix("_3")
    model = make_sampler(base, torch.float32, **sizes)
    if case == "bd3_lm_2":
        model.description["block_size"] = 2
    if case == "set_dlm_3":
        model.description |= {"set_size": 2, "max_set_size": 3}
    model.network.lm_head.weight.mul_(0.4)  # type: ignore[union-attr]
    return model
