"""The Megatron model in float32 against the dense-mask float64 oracle: loss and every gradient."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints_conversion.network_fields import describe_network
from checkpoints_conversion.parameter_map import map_to_megatron, map_to_sampler
from megatron_eso.batches.dealing import Dealing
from megatron_eso.data.samples.lengths import draw_lengths
from megatron_eso.data.samples.order import SampleOrder
from megatron_eso.data.samples.training_data import TrainingData
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.objectives.noise.schedule import LogLinearSchedule
from megatron_eso.objectives.noise.slots import diffusion_times, draw_noise
from megatron_eso.objectives.objective import Samples, Step
from tests.ranks.network import compute_gradients
from tests.support.dense_family import dense_losses as dense_family_losses
from tests.support.dense_oracle import (
    OracleConfig,
    dense_losses,
    dense_objective,
    draw_parameters,
)
from tests.support.planning import objective_of
from tests.support.training import FAMILY, SCALED, TP2, Overrides, tiny_config
from tests.support.world import World

pytestmark = pytest.mark.parallel

LOSS_TOLERANCE = 1e-5  # relative
GRADIENT_TOLERANCE = 1e-4  # of a tensor's gradient, relative, in the Euclidean norm

BASE: Overrides = {"model.head_bias": "true", "model.num_layers": 3, "optimizer.ema_decay": 0}
FRAMED: Overrides = {"data.framing": '"bos_eos"'}
CUT: Overrides = {"data.ssl_ratio": 0.5}
SEQUENCE_PARALLEL: Overrides = TP2 | {"parallel.sequence_parallel": "true"}
CASES: dict[str, tuple[int, Overrides]] = {
    "both phases": (1, {}),
    "both phases, low_var": (1, {"objective.loss_type": '"low_var"'}),
    "diffusion only": (1, {"objective.alpha_0": 1.0}),
    "sequential only": (1, {"objective.alpha_0": 0.0}),
    "single-phase micro-batches": (1, {"train.micro_batch_size": 1}),
    "grouped queries": (1, {"model.num_query_groups": 2}),
    "two tokens": (1, {"data.sequence_length": 2}),
    "one token": (1, {"data.sequence_length": 1}),
    "framed": (1, FRAMED),
    "cut short": (1, CUT),
    "cut short, framed, TP=2 SP": (2, CUT | FRAMED | SEQUENCE_PARALLEL),
    "recomputed": (1, {"train.recompute_granularity": '"full"'}),
    "TP=2 SP": (2, SEQUENCE_PARALLEL | {"model.num_query_groups": 2}),
    "wide heads, biases of queries, keys, values, scaled rope": (1, SCALED),
    "the same, TP=2 SP": (2, SEQUENCE_PARALLEL | SCALED | {"model.num_query_groups": 2}),
    "eso_lm a": (1, {"objective.variant": '"a"'}),
    **{name: (1, overrides) for name, overrides in FAMILY.items()},
    "documents, TP=2 SP": (2, SEQUENCE_PARALLEL | {"data.document_attention": "true"}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_the_oracles(
    case: str, world: World, tiny_data: Path, tmp_path: Path
) -> None:
    # Draw one network for both sides, with float32 values.
    num_ranks, overrides = CASES[case]
    overrides = BASE | overrides
    config = tiny_config(tmp_path, tiny_data, overrides)
    model, vocab_size, mask_id = config.model, config.data.vocab_size, config.data.mask_token_id
    assert vocab_size is not None
    assert mask_id is not None
    oracle = OracleConfig(
        num_layers=model.num_layers,
        num_heads=model.num_attention_heads,
        num_groups=model.num_query_groups,
        mask_token_id=mask_id,
        rope_scaling=(4.0, 0.2, 4.0, 40) if model.rope_scaling else None,
    )
    parameters = draw_parameters(
        oracle,
        hidden_size=model.hidden_size,
        vocab_size=vocab_size,
        head_dim=model.kv_channels,
        biases=model.add_bias_linear,
        qkv_biases=model.add_bias_linear or model.add_qkv_bias,
    )
    network = describe_network(config, tmp_path)
    padded = model.pad_vocabulary(vocab_size)
    plain = {name: tensor.detach().float() for name, tensor in parameters.items()}
    tensors = map_to_megatron(network, plain, padded_vocab_size=padded)
    with torch.no_grad():  # the float32 values are the model; float64 is how the oracle computes
        for name, tensor in parameters.items():
            tensor.copy_(plain[name].double())

    # Compare the loss, and each gradient by its norm.
    loss, gradients = world.run(
        compute_gradients, num_ranks, tmp_path, tiny_data, overrides, tensors
    )[0]
    expected = oracle_loss(config, oracle, parameters)
    expected.backward()
    assert loss == pytest.approx(float(expected), rel=LOSS_TOLERANCE)
    found = map_to_sampler(network, gradients, residual_gates=False)
    for name, tensor in parameters.items():
        assert tensor.grad is not None, name
        scale = tensor.grad.norm()
        if scale == 0:
            assert found[name].norm() == 0, name
            continue
        error = (found[name].double() - tensor.grad).norm() / scale
        assert error < GRADIENT_TOLERANCE, (name, float(error))


def oracle_loss(config, oracle, parameters):  # type: ignore[no-untyped-def]
    """Compute the oracle's loss of the first step's samples, each at its own length."""
    # The other objectives have an oracle of their own.
    if (
        config.data.document_attention
        or config.objective.variant == "a"
        or config.objective.sequential_prediction == "next"
        or config.objective.name != "eso_lm"
    ):
        return family_loss(config, oracle, parameters)
    # The noise of the step's samples.
    dataset, train, seed = TokenDataset.open(config.data.train), config.train, config.run.seed
    sizes = (train.global_batch_size, train.micro_batch_size, 1)
    dealing = Dealing(*sizes, config.objective.batch_split)
    places = np.concatenate(dealing.micro_batches(0))
    is_sequential = dealing.split.phases(places) == 1
    times = diffusion_times(seed, 0, dealing.split, places)
    alpha_0, length = config.objective.alpha_0, config.data.sequence_length
    lengths = draw_lengths(seed, places, config.data.ssl_ratio, length)
    schedule = LogLinearSchedule(alpha_0)
    noise = draw_noise(seed, places, is_sequential, times, schedule, length, length_B=lengths)
    # Their tokens, then the losses.
    if config.data.framing == "bos_eos":
        rows = SampleOrder(seed, dataset.num_rows(length - 2)).rows(places)
        tokenizer = dataset.manifest.tokenizer
        x_0 = [
            [tokenizer.bos_token_id, *text, tokenizer.eos_token_id]
            for text in dataset.rows(rows, length - 2).tolist()
        ]
    else:
        rows = SampleOrder(seed, dataset.num_rows(length)).rows(places)
        x_0 = dataset.rows(rows, length).tolist()
    losses = dense_losses(
        parameters,
        oracle,
        torch.tensor(x_0),
        noise,
        alpha_0=alpha_0,
        loss_type=config.objective.loss_type,
    )
    return dense_objective(losses, noise, dealing)


def family_loss(config, oracle, parameters):  # type: ignore[no-untyped-def]
    """Compute the oracle's loss of the first step's samples from a plan of the objective."""
    objective, size = objective_of(config), config.train.global_batch_size
    data = TrainingData.open(config.data, config.run.seed)
    tokens_BT = data.samples(np.arange(size))
    samples = Samples(
        tokens_BT=tokens_BT,
        indices_B=np.arange(size),
        length_B=data.lengths(np.arange(size)),
        documents_BT=data.documents(tokens_BT),
    )
    batch = objective.plan(samples, Step(number=0, first_index=0, batch_size=size))
    section = dataclasses.asdict(config.objective)
    losses = dense_family_losses(section, parameters, oracle, batch, samples)
    weighted = losses * batch.loss.weights_E[: batch.loss.num_real].double()
    phase_E = batch.loss.phase_E[: batch.loss.num_real]
    targets_B = objective.count_targets(samples.length_B)
    return sum(
        weighted[phase_E == phase].sum() / targets_B[batch.phase_B == phase].sum()
        for phase in range(len(objective.phases))
        if (batch.phase_B == phase).any()
    )
