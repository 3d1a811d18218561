"""Estimates compared with enumeration, closed forms written by hand, and the paper's sizes."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from checkpoints_conversion.network_fields import describe_network
from megatron_eso.config.model import ModelConfig
from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.config.sections import (
    Config,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    Vocabulary,
)
from megatron_eso.estimates.flops import forward_flops, training_flops_per_token
from megatron_eso.estimates.memory import MemoryEstimate, estimate_checkpoint, estimate_memory
from megatron_eso.estimates.parameters import count_parameters, count_rank_parameters
from megatron_eso.objectives.build import build_objective
from megatron_eso.objectives.noise.schedule import LogLinearSchedule
from megatron_eso.objectives.row_counts import (
    RowCounts,
    count_diffusion_rows,
    count_sequential_rows,
    expect_diffusion_rows,
    expect_sequential_rows,
)
from megatron_eso.sampler.network.network_eso_lm import EsoNetwork

NUM_TOKENS = 12
VOCAB_SIZE = 50258
SMALL = ModelConfig(num_layers=12, hidden_size=768, num_attention_heads=12)
INTEGRAL_TOLERANCE = 1e-9
DESIGN_TOLERANCE = 0.02  # the design states its ratios with two digits


def build(**changes: object) -> Config:
    sections: dict[str, object] = {
        "run": RunConfig(directory="runs/test"),
        "model": SMALL,
        "data": DataConfig(train="shards", sequence_length=1024),
        "train": TrainConfig(num_steps=10, global_batch_size=64, micro_batch_size=4),
        "optimizer": OptimizerConfig(learning_rate=1e-3),
    }
    return Config(**(sections | changes))  # type: ignore[arg-type]


def flops_per_token(config: Config) -> float:
    objective = build_objective(config.objective, Vocabulary(size=1, mask_token_id=0), seed=1)
    return training_flops_per_token(config.model, VOCAB_SIZE, objective, 1024)


def memory_of(config: Config, data_parallel_size: int) -> MemoryEstimate:
    objective = build_objective(config.objective, Vocabulary(size=1, mask_token_id=0), seed=1)
    return estimate_memory(config, VOCAB_SIZE, objective, data_parallel_size)


def average(counts: list[RowCounts], weights: np.ndarray) -> RowCounts:
    total = RowCounts()
    for count, weight in zip(counts, weights, strict=True):
        total += count * float(weight)
    return total


def binomial(masked: float) -> np.ndarray:
    return np.array(
        [
            math.comb(NUM_TOKENS, m) * masked**m * (1 - masked) ** (NUM_TOKENS - m)
            for m in range(NUM_TOKENS + 1)
        ]
    )


@pytest.mark.parametrize("alpha_0", [0.125, 0.5, 1.0])
def test_diffusion_rows_are_expected_as_summed_over_times_and_masks(alpha_0: float) -> None:
    objective = ObjectiveConfig(alpha_0=alpha_0)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    eps = objective.sampling_eps
    times = eps + (1 - eps) * (nodes + 1) / 2
    counts = [count_diffusion_rows(NUM_TOKENS, m) for m in range(NUM_TOKENS + 1)]
    alphas = LogLinearSchedule(alpha_0=alpha_0).alpha(times)
    probabilities = sum(w / 2 * binomial(1 - a) for a, w in zip(alphas, weights, strict=True))
    summed = average(counts, np.asarray(probabilities))
    expected = expect_diffusion_rows(NUM_TOKENS, alpha_0, eps)
    np.testing.assert_allclose(
        dataclasses.astuple(expected), dataclasses.astuple(summed), rtol=INTEGRAL_TOLERANCE
    )


@pytest.mark.parametrize("alpha_0", [0.0, 0.125, 0.9])
def test_sequential_rows_are_expected_as_summed_over_masks(alpha_0: float) -> None:
    counts = [count_sequential_rows(NUM_TOKENS, m) for m in range(NUM_TOKENS + 1)]
    summed = average(counts, binomial(1 - alpha_0))
    expected = expect_sequential_rows(NUM_TOKENS, alpha_0)
    np.testing.assert_allclose(
        dataclasses.astuple(expected), dataclasses.astuple(summed), rtol=INTEGRAL_TOLERANCE
    )


def test_pairs_are_those_of_the_masks_written_out() -> None:
    slots = np.arange(NUM_TOKENS)
    causal = slots[:, None] >= slots[None]
    masked = slots >= NUM_TOKENS - 5
    diffusion = count_diffusion_rows(NUM_TOKENS, 5)
    assert (diffusion.pairs, diffusion.loss_pairs) == (causal.sum(), causal[masked].sum())
    sequential = count_sequential_rows(NUM_TOKENS, 5)
    clean = causal[:-1, :-1].sum()
    strict_and_self = (slots[:, None] > slots[None])[masked].sum() + masked.sum()
    assert sequential.pairs == clean + strict_and_self
    assert sequential.loss_pairs == strict_and_self
    assert (sequential.rows, sequential.loss_rows) == (NUM_TOKENS - 1 + 5, 5)


def test_a_causal_model_costs_what_the_textbook_says() -> None:
    counts = RowCounts(rows=1024, pairs=1024 * 1025 / 2, loss_rows=1024, loss_pairs=1024 * 1025 / 2)
    weights = 12 * 12 * 768**2 + 768 * VOCAB_SIZE
    attention = 12 * 4 * 768 * 1024 * 1025 / 2
    assert forward_flops(SMALL, VOCAB_SIZE, counts) == 2 * 1024 * weights + attention


@pytest.mark.parametrize("kv_channels", [4, 6])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_forward_pass_has_the_flops_and_parameters_that_torch_counts(
    activation: str, kv_channels: int
) -> None:
    model = ModelConfig(
        num_layers=3,
        hidden_size=16,
        num_attention_heads=4,
        kv_channels=kv_channels,
        num_query_groups=2,
        activation=activation,  # type: ignore[arg-type]
        add_bias_linear=False,
        add_qkv_bias=True,
        make_vocab_size_divisible_by=1,
    )
    data = DataConfig(train="shards", sequence_length=12, vocab_size=11, mask_token_id=10)
    network = EsoNetwork(describe_network(build(model=model, data=data), "config.json"))
    tokens = torch.zeros(1, 12, dtype=torch.int64)
    # The network's attention computes all pairs of rows.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network.logits(network.hidden_states(tokens, torch.arange(12)[None]))
    counts = RowCounts(rows=12, pairs=12 * 12, loss_rows=12, loss_pairs=12 * 12)
    assert forward_flops(model, 11, counts) == counter.get_total_flops()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert count_parameters(model, 11).total == parameters


def test_the_hybrid_objective_costs_a_quarter_more_than_a_causal_model() -> None:
    pairs = 1024 * 1025 / 2
    causal = RowCounts(rows=1024, pairs=pairs, loss_rows=1024, loss_pairs=pairs)
    per_token = 3 * forward_flops(SMALL, VOCAB_SIZE, causal) / 1024
    ratio = flops_per_token(build()) / per_token
    assert ratio == pytest.approx(1.25, abs=DESIGN_TOLERANCE)


@pytest.mark.parametrize(("alpha_0", "phase"), [(1.0, "diffusion"), (0.0, "sequential")])
def test_an_edge_of_alpha_0_costs_its_phase_alone(alpha_0: float, phase: str) -> None:
    objective = ObjectiveConfig(alpha_0=alpha_0)
    counts = {
        "diffusion": expect_diffusion_rows(1024, alpha_0, objective.sampling_eps),
        "sequential": expect_sequential_rows(1024, alpha_0),
    }[phase]
    flops = 3 * forward_flops(SMALL, VOCAB_SIZE, counts) / 1024
    per_token = flops_per_token(build(objective=objective))
    assert per_token == pytest.approx(flops)


def test_parameters_are_counted_as_by_hand() -> None:
    model = dataclasses.replace(SMALL, add_bias_linear=False, normalization="RMSNorm")
    counts = count_parameters(model, VOCAB_SIZE)
    assert counts.layers == 12 * (12 * 768**2 + 2 * 768)
    assert counts.embedding == counts.head == 50304 * 768
    assert counts.total == counts.layers + 2 * counts.head + 768


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_ranks_hold_the_model_and_replicas(tensor: int, pipeline: int, tied: bool) -> None:
    model = ModelConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        qk_layernorm=True,
        residual_gates=True,
        head_bias=True,
        share_embeddings_and_output_weights=tied,
    )
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
    )
    held = sum(
        tensor * count_rank_parameters(model, parallel, 98, stage) for stage in range(pipeline)
    )
    counts = count_parameters(model, 98)
    replicated_per_layer = 2 * 2 * 64 + 2 * 2 * 16 + 2 * 64 + 2 * 64
    replicas = (tensor - 1) * (4 * replicated_per_layer + 2 * 64)
    second_embedding = counts.embedding if tied and pipeline > 1 else 0
    assert held == counts.total + replicas + second_embedding


def test_state_takes_its_bytes_per_parameter() -> None:
    config = build(
        train=TrainConfig(num_steps=10, global_batch_size=64, micro_batch_size=4, precision="bf16"),
        optimizer=OptimizerConfig(learning_rate=1e-3, ema_decay=0.9999),
    )
    total = count_parameters(SMALL, VOCAB_SIZE).total
    memory = memory_of(config, 4)
    assert (memory.weights, memory.gradients) == (2 * total, 4 * total)
    assert (memory.optimizer, memory.ema) == (12 * total, 4 * total)
    assert estimate_checkpoint(config, VOCAB_SIZE) == (12 + 4) * total
    sharded = dataclasses.replace(config, parallel=ParallelConfig(use_distributed_optimizer=True))
    memory = memory_of(sharded, 4)
    assert memory.optimizer == 12 * math.ceil(total / 4)


def test_recomputation_and_tensor_parallelism_save_activations() -> None:
    def estimate(parallel: ParallelConfig, recompute: str) -> int:
        train = TrainConfig(
            num_steps=10,
            global_batch_size=64,
            micro_batch_size=4,
            recompute_granularity=recompute,  # type: ignore[arg-type]
        )
        config = build(train=train, parallel=parallel)
        return memory_of(config, 1).activations

    plain = estimate(ParallelConfig(), "none")
    assert estimate(ParallelConfig(), "full") < plain
    tensor = estimate(ParallelConfig(tensor_model_parallel_size=2), "none")
    by_rows = estimate(ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True), "none")
    assert by_rows < tensor < plain
