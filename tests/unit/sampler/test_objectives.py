"""The sampler and the likelihood of each objective equal full recomputation; refusals."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_eso.sampler.objectives.model import SamplerModel
from megatron_eso.sampler.steps.ordering import draw_times, plan_ancestral
from tests.support.recomputed_logits import CASES, make_sampler, recompute, record_logits

CACHE_TOLERANCE = 1e-10
EXACT = 1e-10
MASK = 3
V = 11
T = 8

PROMPTS = {
    "nothing known": [[MASK] * T] * 3,
    "prefixes": [[5] + [MASK] * 7, [1, 2, 4, 5, 6, 7, 8, MASK], [0] * T],
    "gaps": [[MASK] * T, [1, MASK, 2, MASK, MASK, 4, MASK, MASK], [0] * 7 + [MASK]],
}


def fits(case: str, prompt: str) -> bool:
    """Return whether an objective can continue a prompt."""
    return (
        prompt == "prefixes"
        or not case.startswith("ar")
        or (prompt == "nothing known" and case != "ar_none")
    )


def draw_gumbel(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return -(-torch.rand(shape, generator=generator, dtype=torch.float64).log()).log()


def as_rows(schedule: list[Any], num_samples: int) -> list[list[int]]:
    return schedule if schedule and isinstance(schedule[0], list) else [schedule] * num_samples


def generate_without_cache(
    model: SamplerModel, prompt: Tensor, schedules: list[list[int]], order: Tensor, gumbel: Tensor
) -> tuple[Tensor, Tensor]:
    """Generate by one full pass per sample and step; return tokens, and logits in slot order."""
    tokens = prompt.clone()
    logits_of_slot = torch.zeros(*prompt.shape, V, dtype=torch.float64)
    num_random = round(getattr(model, "alpha_0", 0) * prompt.shape[1])
    for row, schedule in enumerate(schedules):
        slot = prompt.shape[1] - sum(schedule)
        # The sequential phase begins with the first step from which enough tokens are known.
        first = slot
        for count in schedule:
            first += count if first < num_random else 0
        for count in schedule:
            logits = recompute(model, tokens[row : row + 1], order[row : row + 1], first)[0]
            for i in range(slot, slot + count):
                logits_of_slot[row, i] = logits[i]
                noisy = logits[i] + gumbel[row, i]
                noisy[MASK] = -torch.inf
                tokens[row, order[row, i]] = noisy.argmax()
            slot += count
    return tokens, logits_of_slot


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in CASES for name in PROMPTS if fits(case, name)],
)
def test_the_cached_sampler_equals_full_recomputation(case: str, name: str) -> None:
    model, prompt = make_sampler(case), torch.tensor(PROMPTS[name])
    gumbel = draw_gumbel(*prompt.shape, V)
    for steps in (None,) if case.startswith("ar") else (None, 3):
        drawn = model.generate(len(prompt), prompt=prompt, steps=steps, seed=1)
        schedules, order = as_rows(drawn.schedule, len(prompt)), drawn.permutation
        seen = record_logits(model)
        out = model.generate(
            len(prompt), prompt=prompt, schedule=schedules, permutation=order, gumbel=gumbel
        )
        del model.network.logits
        expected, logits_of_slot = generate_without_cache(model, prompt, schedules, order, gumbel)
        assert torch.equal(out.sequences, expected)
        assert out.nfe == len(seen) == max(len(schedule) for schedule in schedules)
        found = iter(torch.cat(seen))
        for step in range(out.nfe):
            for row, schedule in enumerate(schedules):
                if step < len(schedule):
                    first = T - sum(schedule[step:])
                    for slot in range(first, first + schedule[step]):
                        difference = next(found) - logits_of_slot[row, slot]
                        assert float(difference.abs().max()) < CACHE_TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_a_seed_repeats_and_a_sample_does_not_depend_on_the_others(case: str) -> None:
    model = make_sampler(case)
    prompt = torch.tensor([[5] + [MASK] * 7, [1, 2] + [MASK] * 6, [5] + [MASK] * 7])
    out, again = (model.generate(3, prompt=prompt, seed=11) for _ in range(2))
    assert torch.equal(out.sequences, again.sequences)
    assert torch.equal(out.sequences[:1], model.generate(1, prompt=prompt[:1], seed=11).sequences)
    assert not torch.equal(out.sequences[0], out.sequences[2])
    assert not (out.sequences == MASK).any()
    is_known = prompt != MASK
    assert torch.equal(out.sequences[is_known], prompt[is_known])


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("mdlm", "bd3_lm")])
def test_probabilities_of_all_texts_sum_to_one(case: str) -> None:
    model: Any = make_sampler(case, vocab_size=4)
    texts = torch.tensor(list(itertools.product(range(3), repeat=3)))
    if case.startswith("ar"):
        found = model.log_likelihood(texts)
    else:
        found = model.log_likelihood(texts, torch.tensor([[2, 0, 1]]).expand(27, 3).contiguous())
        order = torch.tensor([[0, 1, 2]]).expand(27, 3).contiguous()
        expected = model.token_log_likelihoods(texts, order)
        assert torch.equal(model.score_left_to_right(texts), expected)
    # Without a prepended token each first token is given, with probability 1.
    num_given = 3 if case == "ar_none" else 1
    assert float(found.exp().sum()) == pytest.approx(num_given, abs=EXACT)


@pytest.mark.parametrize("case", ["mdlm", "bd3_lm"])
def test_an_objective_without_an_exact_likelihood_is_refused(case: str) -> None:
    model = make_sampler(case)
    assert not model.has_exact_likelihood
    with pytest.raises(ValueError, match=f"objective {case} has no exact likelihood"):
        model.score_left_to_right(torch.zeros(1, 3, dtype=torch.int64))


def test_a_row_of_ar_predicts_the_next_token_from_the_text_before_it() -> None:
    tokens = torch.tensor([[5, 1, 7, 2]])
    for case, prepended in (("ar_mask", [MASK]), ("ar_bos", [1]), ("ar_none", [])):
        model: Any = make_sampler(case)
        logits = model.logits(tokens)
        assert logits.shape == (1, 4, V)
        for i in range(4):
            rows = torch.tensor([[*prepended, *tokens[0, : i + 1].tolist()]])
            positions = torch.arange(rows.shape[1])[None]
            expected = model.network.logits(model.network.hidden_states(rows, positions))[0, -1]
            torch.testing.assert_close(logits[0, i], expected, atol=EXACT, rtol=0)
        assert model.token_log_likelihoods(tokens).shape == (1, 3 + len(prepended))


def test_block_diffusion_of_one_block_is_mdlm() -> None:
    block: Any = make_sampler("bd3_lm")
    mdlm: Any = make_sampler("mdlm")
    z_t = torch.tensor([[MASK, 4, MASK, 2, MASK, 0]])
    found = block.block_logits(z_t, z_t, block_size=6)
    torch.testing.assert_close(found, mdlm.diffusion_logits(z_t), atol=EXACT, rtol=0)


def test_block_diffusion_of_single_tokens_is_set_diffusion_left_to_right() -> None:
    block: Any = make_sampler("bd3_lm")
    sets: Any = make_sampler("set_dlm")
    x_0 = torch.tensor([[5, 4, 1, 2, 8, 0]])
    masked, order = torch.full_like(x_0, MASK), torch.arange(6)[None]
    found = block.block_logits(masked, x_0, block_size=1)
    expected = sets.sequential_logits(masked, x_0, order)
    torch.testing.assert_close(found, expected, atol=EXACT, rtol=0)


def test_sets_are_the_tokens_whose_times_fall_into_an_interval() -> None:
    model: Any = make_sampler("set_dlm", max_length=64)
    for steps in (4, 16, 64):
        out = model.generate(2, length=64, steps=steps, seed=3)
        for row, (order, counts) in enumerate(
            zip(out.permutation, as_rows(out.schedule, 2), strict=True)
        ):
            times = torch.from_numpy(draw_times(model.law, 3, row, 64))[order]
            assert bool((times.diff() <= 0).all())
            intervals = ((1 - times) * steps).long()
            expected = torch.unique_consecutive(intervals, return_counts=True)[1]
            assert counts == expected.tolist()


def test_the_sequential_phase_of_an_eso_lm_has_the_order_of_training() -> None:
    model: Any = make_sampler("eso_lm_b", max_length=64)
    ascending = torch.arange(64)
    # One model with several orders.
    orders = {}
    for name, sizes in {
        "left_to_right": (None, None),
        "uniform": (None, None),
        "staggered": (4, 8),
        "one": (1, 1),
    }.items():
        law = {"order": name if name != "one" else "staggered"}
        model.description |= law | dict(zip(("set_size", "max_set_size"), sizes, strict=True))
        orders[name] = model.generate(1, alpha_0=0.0, seed=2).permutation[0]
        # The order of the diffusion phase does not depend on it.
        both = model.generate(1, alpha_0=0.5, seed=2).permutation[0]
        _, num_random = plan_ancestral(2, 64, 0, 0.5, 64)
        orders[f"{name}, random part"] = both[:num_random]
        assert sorted(both.tolist()) == ascending.tolist()
    assert torch.equal(orders["left_to_right"], ascending)
    assert torch.equal(orders["one"], ascending)
    # How far a position is from its slot.
    lag = {
        name: float((orders[name] - ascending).abs().float().mean())
        for name in orders
        if "," not in name
    }
    assert 0 < lag["staggered"] < 8 < lag["uniform"]
    parts = [orders[name] for name in orders if "," in name]
    assert all(torch.equal(part, parts[0]) for part in parts)


def test_a_step_of_mdlm_that_reveals_nothing_needs_no_forward_pass() -> None:
    out = make_sampler("mdlm").generate(1, length=4, steps=1000, seed=0)
    assert out.nfe == len(out.schedule) <= 4


def test_requests_that_an_objective_cannot_serve_are_refused() -> None:
    gap = torch.tensor([[MASK, 1, MASK, MASK]])
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("ar_mask", {"prompt": gap}, "not a prefix"),
        ("ar_none", {"length": 4}, "prepend_token = none"),
        ("ar_mask", {"length": 4, "schedule": [2, 2]}, "one token in each step"),
        ("ar_mask", {"length": 4, "steps": 2}, "one token in each step"),
        ("ar_mask", {"length": 4, "permutation": torch.tensor([[1, 0, 2, 3]])}, "left to right"),
        ("bd3_lm", {"length": 4, "schedule": [4]}, "tokens of two blocks of 3"),
        ("bd3_lm", {"length": 4, "permutation": torch.tensor([[3, 0, 1, 2]])}, "block after block"),
        ("set_dlm", {"length": 1}, "no staggered schedule of 1 positions"),
        ("mdlm", {"length": 4, "steps": 0}, "steps is 0"),
    ]
    for case, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            make_sampler(case).generate(1, seed=1, **arguments)
