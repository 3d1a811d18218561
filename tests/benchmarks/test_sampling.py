"""Latency of sampling one text at about one forward pass per token, for every objective.

A cached objective is timed over the whole text, as the median of `REPEATS` texts. MDLM computes all
positions in each step, so its latency is the time of a step, from at least `TIMED_STEPS` steps,
times their number. The control has no cache: each step computes all rows up to those that it
reveals.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.sampler.network.masks_eso_lm import block_mask
from megatron_eso.sampler.network.network_eso_lm import EsoNetwork
from megatron_eso.sampler.network.objective_fields import OBJECTIVE_FIELDS
from megatron_eso.sampler.objectives.bd3_lm import BD3LM
from megatron_eso.sampler.objectives.build import MODELS
from megatron_eso.sampler.objectives.model import SamplerModel
from tests.support.networks import make_network_config

VOCAB_SIZE = 4096
LENGTHS = (256, 512, 1024, 2048)
TIMED_STEPS = 24
REPEATS = 5
MANY_STEPS = 2**20
"""Time steps of the diffusion; with so many, a step reveals one token."""

FAMILY: dict[str, dict[str, Any]] = {
    "ar": {"name": "ar"},
    "eso_lm b, alpha_0 = 1": {"alpha_0": 1.0},
    "eso_lm b, alpha_0 = 0.125": {"alpha_0": 0.125},
    "eso_lm next, alpha_0 = 0.125": {"alpha_0": 0.125, "sequential_prediction": "next"},
    "set_dlm": {"name": "set_dlm"},
    "bd3_lm, block_size = 16": {"name": "bd3_lm", "block_size": 16},
    "bd3_lm, block_size = 4": {"name": "bd3_lm", "block_size": 4},
    "mdlm": {"name": "mdlm"},
}
HAS_STEPS = ("eso_lm", "bd3_lm", "mdlm")
"""Objectives whose default schedule reveals several tokens in a step."""


def make_model(settings: dict[str, Any]) -> SamplerModel:
    """Build a model of 4 layers, 256 wide, with random weights."""
    torch.manual_seed(1)
    network = EsoNetwork(
        make_network_config(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            num_hidden_layers=4,
            head_dim=64,
            intermediate_size=1024,
            mask_token_id=VOCAB_SIZE - 1,
            max_length=max(LENGTHS),
        )
    )
    for weight in network.lm_head.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    config = ObjectiveConfig(**settings)
    fields = {key: getattr(config, key, None) for key in OBJECTIVE_FIELDS[config.name]}
    return MODELS[config.name](network.eval().requires_grad_(False), fields)


def cpu_seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU time of an action, and its result."""
    began = time.process_time()
    result = action()
    return time.process_time() - began, result


def sample(model: SamplerModel, length: int, num_steps: int) -> tuple[float, int]:
    """Return the seconds of a step and the number of steps, where the last ones are timed."""
    prompt = torch.full((1, length), VOCAB_SIZE - 1)
    prompt[:, : length - num_steps] = torch.randint(VOCAB_SIZE - 1, (1, length - num_steps))
    steps = MANY_STEPS if model.objective in HAS_STEPS else None
    seconds, generation = cpu_seconds(lambda: model.generate(1, prompt, seed=1, steps=steps))
    return seconds / generation.nfe, generation.nfe


@torch.no_grad()
def reveal_without_cache(network: EsoNetwork, tokens_1R: Tensor, block_size: int) -> Tensor:
    """Compute all rows, and choose the likeliest token of the last one."""
    rows_1R = torch.arange(tokens_1R.shape[1])[None]
    is_visible_1RR = block_mask(rows_1R, tokens_1R.shape[1], block_size)
    return network.logits(network.hidden_states(tokens_1R, rows_1R, is_visible_1RR)[:, -1]).argmax()


def time_step_without_cache(model: SamplerModel, length: int) -> float:
    """Return the mean seconds of a step that computes all rows up to those that it reveals."""
    size = model.block_size if isinstance(model, BD3LM) else 1
    seconds = 0.0
    for step in range(TIMED_STEPS):
        block = round((step + 0.5) / TIMED_STEPS * length) // size
        tokens_1R = torch.randint(VOCAB_SIZE, (1, min((block + 1) * size, length)))
        seconds += cpu_seconds(partial(reveal_without_cache, model.network, tokens_1R, size))[0]
    return seconds / TIMED_STEPS


@pytest.mark.bench
def test_latency_of_sampling() -> None:
    # The models, all with the same network.
    torch.set_num_threads(1)
    models = {name: make_model(settings) for name, settings in FAMILY.items()}
    latency: dict[tuple[str, int], float] = {}
    for length in LENGTHS:
        print(f"\nT={length}, load {os.getloadavg()[0]:.1f}")
        for name, model in models.items():
            sample(model, LENGTHS[0], TIMED_STEPS)
            is_long = model.objective == "mdlm" and length > LENGTHS[0]
            seconds, nfe = (
                sample(model, length, TIMED_STEPS)
                if is_long
                else sorted(sample(model, length, length) for _ in range(REPEATS))[REPEATS // 2]
            )
            # The number of steps of a text is that of the schedule, whatever is timed.
            nfe = length if is_long else nfe
            latency[name, length] = seconds * nfe
            # The line of the table, with the control where there is a cache.
            line = (
                f"{name:28s} {seconds * 1e3:8.2f} ms a step, {nfe:4d} steps: {seconds * nfe:8.2f} s"
                f"; over AR {latency[name, length] / latency['ar', length]:6.2f}x"
                f", over T={LENGTHS[0]} {latency[name, length] / latency[name, LENGTHS[0]]:6.1f}x"
            )
            if model.objective != "mdlm":
                control = time_step_without_cache(model, length) * nfe
                factor = control / latency[name, length]
                line += f"; without a cache {control:8.2f} s, {factor:5.1f}x"
            print(line, flush=True)
