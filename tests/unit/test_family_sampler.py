"""The sampler's logits of every objective give the losses that training computes from its rows."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_eso.batches.rows import MicroBatch
from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.model.attention_backend import BACKENDS
from megatron_eso.objectives.objective import Samples, Step
from megatron_eso.sampler.network.network_eso_lm import EsoNetwork
from megatron_eso.sampler.network.objective_fields import OBJECTIVE_FIELDS
from megatron_eso.sampler.objectives.build import MODELS
from tests.support.dense_family import positions_of, read_order
from tests.support.dense_oracle import OracleConfig, draw_parameters, row_losses, token_losses
from tests.support.networks import make_network_config
from tests.support.planning import FAMILY, family_objective

# Both sides are in float64; the rotary angles of both are float32.
TOLERANCE = 1e-6
VOCAB, MASK, T, B = 11, 10, 12, 6
SIZES = {
    "hidden_size": 16,
    "head_dim": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "mask_token_id": MASK,
}
# Heads of another width, biases of queries, keys and values alone, and scaled frequencies, of
# which one is kept, one divided, and one between.
SCALED = {
    "head_dim": 6,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "use_rope_scaling": True,
    "rope_scaling_factor": 4.0,
    "rope_low_freq_factor": 0.2,
    "rope_original_length": 40,
}


def make_models(name: str, *, is_scaled: bool) -> tuple[Any, OracleConfig, dict[str, Tensor]]:
    """Return a sampler's model, and the same network for the rows of training."""
    scaling = (4.0, 0.2, 4.0, 40) if is_scaled else None
    sizes = {"num_layers": 2, "num_heads": 4, "num_groups": 2}
    oracle = OracleConfig(**sizes, mask_token_id=MASK, rope_scaling=scaling)
    head_dim, biases = (6, False) if is_scaled else (4, True)
    parameters = draw_parameters(
        oracle,
        hidden_size=16,
        vocab_size=VOCAB,
        head_dim=head_dim,
        biases=biases,
        qkv_biases=True,
    )
    parameters = {key: tensor.detach() for key, tensor in parameters.items()}
    changes = SIZES | (SCALED if is_scaled else {})
    network = EsoNetwork(make_network_config(**changes)).double().eval().requires_grad_(False)
    network.load_state_dict(parameters)
    config = ObjectiveConfig(**FAMILY[name])
    fields = {key: getattr(config, key, None) for key in OBJECTIVE_FIELDS[config.name]}
    return MODELS[config.name](network, fields), oracle, parameters


def score_sample(model: Any, x_0: Tensor, batch: MicroBatch, sample: int) -> dict[int, float]:
    """Return `-log p` of each predicted token of a sample, by its position."""
    predicts_next = getattr(model, "predicts_next", False)
    keys = positions_of(batch, next_after=MASK if predicts_next else None)
    masked = [position for b, position in keys if b == sample]
    if model.objective == "ar":
        # A row has the position of its target; without a prepended token the first has none.
        losses = -model.token_log_likelihoods(x_0)[0]
        return {T - len(losses) + i: float(loss) for i, loss in enumerate(losses)}
    z = x_0.clone()
    z[0, masked] = MASK
    if model.objective in ("mdlm", "bd3_lm"):
        is_mdlm = model.objective == "mdlm"
        logits = model.diffusion_logits(z) if is_mdlm else model.block_logits(z, x_0)
        losses = token_losses(logits, x_0, MASK)[0]
        return {position: float(losses[position]) for position in masked}
    clean = [position for position in read_order(batch, sample) if position not in masked]
    is_sequential = bool(batch.phase_B[sample])
    masked = sorted(masked) if predicts_next and is_sequential else masked
    order = torch.tensor([[*clean, *masked]])
    if model.objective == "eso_lm" and not is_sequential:
        logits = model.diffusion_logits(z, order)
    else:
        logits = model.sequential_logits(z, x_0, order)
    losses = token_losses(logits, x_0.gather(1, order), MASK)[0]
    return {int(order[0, slot]): float(losses[slot]) for slot in range(len(clean), T)}


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_the_sampler_computes_the_losses_of_training(name: str, is_scaled: bool) -> None:
    model, oracle, parameters = make_models(name, is_scaled=is_scaled)
    tokens = np.random.default_rng(1).integers(0, MASK, (B, T))
    samples = Samples(tokens_BT=tokens, indices_B=np.arange(B), length_B=np.full(B, T))
    batch = family_objective(name, MASK).plan(samples, Step(number=0, first_index=0, batch_size=B))
    losses = row_losses(parameters, oracle, batch, BACKENDS["torch"]())[: batch.loss.num_real]
    is_next = FAMILY[name].get("sequential_prediction") == "next"
    keys = positions_of(batch, next_after=MASK if is_next else None)
    found = {
        sample: score_sample(model, torch.from_numpy(tokens[sample : sample + 1]), batch, sample)
        for sample in {sample for sample, _ in keys}
    }
    expected = torch.tensor([found[b][position] for b, position in keys], dtype=torch.float64)
    assert len(keys) > T
    assert float((losses - expected).abs().max()) < TOLERANCE
