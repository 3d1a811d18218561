"""The KV-cached sampler equals full recomputation; schedules, orders and refusals."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_eso.sampler import EsoLM
from megatron_eso.sampler.steps.choice import TokenChoice, choose_tokens
from megatron_eso.sampler.steps.ordering import plan_ancestral
from tests.support.recomputed_logits import record_logits

CACHE_TOLERANCE = 1e-5
MASK = 3
V = 11


def draw_gumbel(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return -(-torch.rand(shape, generator=generator).log()).log()


def sample_without_cache(
    model: EsoLM, prompt: Tensor, schedules: list[list[int]], order: Tensor, gumbel: Tensor
) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
    """Generate by one full causal pass per sample and step; return tokens and logits by slot."""
    tokens, logits_of_slot = prompt.clone(), {}
    for row, schedule in enumerate(schedules):
        slot = prompt.shape[1] - sum(schedule)
        for count in schedule:
            logits = model.diffusion_logits(tokens[row : row + 1], order[row : row + 1])[0]
            for i in range(slot, slot + count):
                logits_of_slot[row, i] = logits[i].clone()
                logits[i, MASK] = -torch.inf
                tokens[row, order[row, i]] = (logits[i] + gumbel[row, i]).argmax()
            slot += count
    return tokens, logits_of_slot


PROMPTS = {
    "nothing_known": ([[MASK] * 8] * 3, [[3, 1, 2, 1, 1]] * 3),
    "rows_differ": (
        [[MASK] * 8, [1, MASK, 2, MASK, MASK, 4, MASK, MASK], [0] * 7 + [MASK]],
        [[1] * 8, [2, 3], [1]],
    ),
    "a_row_without_unknowns": ([[1] * 8, [MASK] * 8], [[], [8]]),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_the_cached_sampler_equals_full_recomputation(model: EsoLM, case: str) -> None:
    prompt, schedules = torch.tensor(PROMPTS[case][0]), PROMPTS[case][1]
    model.network.to(torch.float32)
    gumbel = draw_gumbel(*prompt.shape, V)
    order = model.generate(len(prompt), prompt=prompt, schedule=schedules, seed=1).permutation
    expected, logits_of_slot = sample_without_cache(model, prompt, schedules, order, gumbel)
    seen = record_logits(model)
    out = model.generate(
        len(prompt), prompt=prompt, schedule=schedules, permutation=order, gumbel=gumbel
    )
    assert torch.equal(out.sequences, expected)
    assert out.nfe == max(len(schedule) for schedule in schedules)
    found = iter(torch.cat(seen))
    for step in range(out.nfe):
        for row, schedule in enumerate(schedules):
            if step < len(schedule):
                first = prompt.shape[1] - sum(schedule[step:])
                for slot in range(first, first + schedule[step]):
                    difference = next(found) - logits_of_slot[row, slot]
                    assert float(difference.abs().max()) < CACHE_TOLERANCE


def test_each_step_reads_the_last_steps_tokens_and_this_steps_masks_only(make) -> None:
    model, rows = make(), []
    original = model.network.hidden_states

    def count_rows(tokens: Tensor, *args: object) -> Tensor:
        rows.append(tokens.shape[1])
        return original(tokens, *args)

    model.network.hidden_states = count_rows
    prompt = torch.tensor([[MASK, 1, 2] + [MASK] * 7])
    model.generate(1, prompt=prompt, schedule=[3, 1, 4], seed=0)
    assert rows == [2 + 3, 3 + 1, 1 + 4]


def test_a_prompt_is_kept_and_no_mask_is_left(model: EsoLM) -> None:
    prompt = torch.tensor([[MASK] * 12, [MASK, 1, 2] * 4, list(range(3)) * 3 + [MASK] * 3])
    out = model.generate(3, prompt=prompt, seed=4)
    is_known = prompt != MASK
    assert torch.equal(out.sequences[is_known], prompt[is_known])
    assert not (out.sequences == MASK).any()
    for row, (counts, order) in enumerate(zip(out.schedule, out.permutation, strict=True)):
        num_known = int(is_known[row].sum())
        assert is_known[row][order[:num_known]].all()
        assert sum(counts) == 12 - num_known
        assert sorted(order.tolist()) == list(range(12))


def test_a_known_text_needs_no_forward_pass(make) -> None:
    prompt = torch.zeros(2, 5, dtype=torch.int64)
    out = make().generate(2, prompt=prompt, seed=0)
    assert out.nfe == 0
    assert out.schedule == []
    assert torch.equal(out.sequences, prompt)


def test_the_mask_token_is_never_sampled_however_likely(make) -> None:
    model = make()
    model.network.lm_head.bias[MASK] = 1e4
    for options in ({}, {"top_p": 0.5}, {"temperature": 0.0}, {"gumbel": draw_gumbel(4, 12, V)}):
        assert not (model.generate(4, seed=1, **options).sequences == MASK).any()


def test_a_seed_repeats_and_samples_are_independent(make) -> None:
    model = make()
    prompt = torch.tensor([[MASK] * 12, [MASK, 1] * 6, [MASK] * 12])
    out = model.generate(3, prompt=prompt, seed=11)
    again = model.generate(3, prompt=prompt, seed=11)
    assert torch.equal(out.sequences, again.sequences)
    assert torch.equal(out.permutation, again.permutation)
    alone = model.generate(1, prompt=prompt[:1], seed=11)
    assert torch.equal(out.sequences[:1], alone.sequences)
    assert out.schedule[0] == alone.schedule
    assert not torch.equal(out.sequences[0], out.sequences[2])
    assert not torch.equal(out.sequences, model.generate(3, prompt=prompt, seed=12).sequences)


def test_temperature_0_and_a_small_nucleus_take_the_likeliest_token(make) -> None:
    model = make()
    still = torch.zeros(2, 12, V)
    common = {"schedule": [1] * 12, "seed": 5}
    expected = model.generate(2, gumbel=still, **common).sequences
    for options in ({"temperature": 0.0}, {"top_p": 1e-6}):
        assert torch.equal(model.generate(2, **common, **options).sequences, expected)


def test_tokens_are_drawn_from_the_softmax(make) -> None:
    logits = torch.tensor([[0.0, 1.0, -2.0, 5.0, 0.5]]).repeat(20_000, 1)
    rows = np.arange(len(logits))
    for temperature, top_p in ((1.0, 1.0), (2.0, 1.0), (1.0, 0.75)):
        choice = TokenChoice(temperature=temperature, top_p=top_p, seed=3, gumbel=None)
        tokens = choose_tokens(logits, MASK, rows, rows * 0, choice)
        found = torch.bincount(tokens, minlength=5) / len(tokens)
        kept = logits[0].masked_fill(torch.arange(5) == MASK, -torch.inf) / temperature
        if top_p < 1:  # probabilities .49, .30, .18, .02: two reach 0.75
            kept[[0, 2]] = -torch.inf
        # Five standard deviations of a frequency.
        assert (found - kept.softmax(0)).abs().max() < 5 * math.sqrt(0.25 / len(tokens))


def test_the_gumbel_at_known_slots_is_ignored(make) -> None:
    model = make()
    prompt = torch.tensor([[5, MASK, MASK, 6, MASK]])
    gumbel = draw_gumbel(1, 5, V)
    common = {"prompt": prompt, "schedule": [1, 2], "seed": 3}
    expected = model.generate(1, gumbel=gumbel, **common).sequences
    gumbel[:, :2] = torch.nan
    assert torch.equal(model.generate(1, gumbel=gumbel, **common).sequences, expected)


@pytest.mark.parametrize("alpha_0", [0.0, 0.125, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 64])
def test_the_ancestral_schedule_has_the_papers_distribution(alpha_0: float, steps: int) -> None:
    num_slots, num_draws = 40, 400
    plans = [plan_ancestral(seed, num_slots, 0, alpha_0, steps) for seed in range(num_draws)]
    assert all(sum(schedule) == num_slots for schedule, _ in plans)
    assert all(min(schedule) >= 1 for schedule, _ in plans)
    alpha_1 = alpha_0 * 1e-3
    share = (alpha_0 - alpha_1) / (1 - alpha_1)
    mean = np.mean([num_random for _, num_random in plans])
    deviation = math.sqrt(num_slots * share * (1 - share) / num_draws)
    assert abs(mean - num_slots * share) <= 5 * deviation + 1e-9
    times = np.linspace(1, 0, steps + 1)
    survival = 1 - alpha_0 * (1 - (1 - 1e-3) * times)
    per_step = -np.diff(survival) / survival[0]
    nonzero = (1 - (1 - per_step) ** num_slots).sum()
    expected = nonzero + num_slots * (1 - share)
    found = np.mean([len(schedule) for schedule, _ in plans])
    assert abs(found - expected) < 5 * math.sqrt(num_slots / num_draws)


def test_edges_of_alpha_0(make) -> None:
    model = make()
    sequential = model.generate(2, alpha_0=0.0, seed=1)
    assert sequential.schedule == [1] * 12
    assert torch.equal(sequential.permutation, torch.arange(12).expand(2, 12))
    diffusion = model.generate(2, alpha_0=1.0, steps=1, seed=1)
    assert diffusion.schedule == [12]
    assert diffusion.nfe == 1
    assert not torch.equal(diffusion.permutation, torch.arange(12).expand(2, 12))


def test_the_tail_of_the_order_ascends(make) -> None:
    model = make(max_length=64)
    out = model.generate(3, seed=2, alpha_0=0.5)
    _, num_random = plan_ancestral(2, 64, 0, 0.5, 64)
    tail = out.permutation[:, num_random:]
    assert bool((tail.diff(dim=1) > 0).all())
    assert not bool((out.permutation[:, :num_random].diff(dim=1) > 0).all())
    # With many known tokens the diffusion phase reveals none.
    prompt = torch.full((1, 64), 5)
    prompt[:, 40:] = MASK
    known = model.generate(1, prompt=prompt, seed=2, alpha_0=0.5)
    assert known.schedule == [1] * 24
    assert known.permutation[0, 40:].tolist() == list(range(40, 64))


def test_arguments_that_do_not_fit_are_refused(make) -> None:
    model = make()
    prompt = torch.tensor([[1, MASK, MASK], [MASK, MASK, 2]])
    masked_first = torch.tensor([[1, 0, 2], [2, 1, 0]])
    cases = [
        # Sizes and prompts.
        ({"num_samples": 0}, "num_samples"),
        ({"length": 13}, "max_length"),
        ({"length": 0}, "length"),
        ({"prompt": prompt, "length": 4}, "length"),
        ({"prompt": prompt[:1]}, "prompt has the shape"),
        ({"prompt": prompt[0]}, "prompt has the shape"),
        ({"prompt": prompt.float()}, "float32"),
        ({"prompt": prompt + 9}, "outside"),
        ({"prompt": torch.ones(2, 13, dtype=torch.int64)}, "max_length"),
        # Orders, schedules and noise.
        ({"prompt": prompt, "permutation": masked_first}, "masked token comes before"),
        ({"prompt": prompt, "permutation": masked_first[:1]}, "permutation"),
        ({"prompt": prompt, "permutation": masked_first * 0}, "permutation"),
        ({"prompt": prompt, "schedule": [1, 1, 1]}, "schedule of sample 0"),
        ({"prompt": prompt, "schedule": [2, 0]}, "schedule of sample 0"),
        ({"prompt": prompt, "schedule": [[2], [1]]}, "schedule of sample 1"),
        ({"prompt": prompt, "schedule": [[2]]}, "one per sample"),
        ({"prompt": prompt, "schedule": [2, [2]]}, "one per sample"),
        ({"prompt": prompt, "gumbel": torch.zeros(2, 3, V + 1)}, "gumbel"),
        # Numbers.
        ({"alpha_0": 1.5}, "alpha_0"),
        ({"steps": 0}, "steps"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"seed": -1}, "seed"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model.generate(**{"num_samples": 2, **arguments})
