"""The simulated step of shipped configurations: what it may take, and where the host waits."""

import json
from collections import Counter

import pytest
import torch

from megatron_eso.estimates.gpus import GPUS
from megatron_eso.estimates.step_time import estimate_step
from megatron_eso.simulation.fake_gpu import fake_gpu
from megatron_eso.simulation.operations import UnknownOperationError, cost_of
from megatron_eso.simulation.parts import PRODUCTS
from megatron_eso.simulation.report import describe_simulation, format_simulation
from megatron_eso.simulation.simulator import simulate
from pretrain.bench import main
from tests.support.planning import objective_of
from tests.support.shipped import BASE, TENSOR_BASE, load_shipped

H100 = GPUS["h100"]
NUM_LAYERS = 4
CELLS = {
    "diffusion": BASE,
    "any_order_ar": (
        *BASE,
        "objective.name=any_order_ar",
        "objective.alpha_0=0.125",
        "objective.loss_type=elbo",
    ),
    "tensor": (*TENSOR_BASE, "parallel/tp4_sp.toml", "scale/64.toml"),
    "pipeline": (*TENSOR_BASE, "parallel/pp2.toml", "scale/64.toml"),
}
# Where the host waits for the GPU in a step, by file; every other wait is a fault.
EXPECTED_WAITS = {"megatron_eso/training/steps/step.py": 1}
# The pipeline's exchange of shapes waits as well.
PIPELINE_WAITS = {"megatron/core/pipeline_parallel/p2p_communication.py"}
# Strict queries of torch's own attention take many kernels.
MAX_KERNELS_PER_LAYER = {name: 800 if name == "any_order_ar" else 400 for name in CELLS}
ESTIMATE_TOLERANCE = 0.15
MAX_BYTES_PER_TOKEN = 30e6


@pytest.mark.parametrize("name", CELLS)
def test_a_step_takes_what_it_may(name: str) -> None:
    config = load_shipped(*CELLS[name], f"model.num_layers={NUM_LAYERS}")
    simulation = simulate(config, H100, 64)
    pipeline = config.parallel.pipeline_model_parallel_size > 1
    for stage in simulation.stages:
        waits: Counter[str] = Counter()
        for (_, place), number in stage.waits.items():
            waits[place.rpartition(":")[0]] += number
        own = {file: number for file, number in waits.items() if file not in PIPELINE_WAITS}
        assert own == EXPECTED_WAITS
        assert pipeline or own == waits
        parts = stage.step.parts.values()
        tokens = config.train.micro_batch_size * config.data.sequence_length
        assert sum(use.kernels for use in parts) < MAX_KERNELS_PER_LAYER[name] * NUM_LAYERS
        assert sum(use.moved for use in parts) < MAX_BYTES_PER_TOKEN * tokens
    mfu = simulation.utilizations
    assert 1 > mfu["kernels"] > mfu["with_optimizer"] > mfu["with_communication"] > 0
    assert (simulation.bubble > 0) == pipeline
    # The planner's estimate from sizes is about the simulated step. It divides the head by the
    # stages as well, which is much of a model of four layers.
    estimate = estimate_step(config, objective_of(config), 64, H100).total
    assert pipeline or estimate == pytest.approx(simulation.step_seconds, rel=ESTIMATE_TOLERANCE)
    # Matrix products cost what the objective's FLOPs say, without attention and head.
    flops = sum(stage.step.parts[PRODUCTS].flops for stage in simulation.stages)
    per_step = flops * simulation.num_micro_batches
    assert 0.5 < per_step / (simulation.model_flops * len(simulation.stages)) < 1
    assert json.loads(json.dumps(describe_simulation(simulation)))["simulated"] is True
    assert format_simulation(simulation).startswith("simulated: 64 x h100; no GPU was used\n")


def test_a_mix_of_devices_is_an_error() -> None:
    with fake_gpu(lambda _: None):
        on_gpu, on_host = torch.empty(4, 4, device="cuda"), torch.empty(4, 4)
        for mix in (torch.add, torch.mm):
            with pytest.raises(RuntimeError, match="device"):
                mix(on_gpu, on_host)


def test_a_wait_is_recorded() -> None:
    waits: list[str] = []
    with fake_gpu(waits.append):
        torch.tensor([1.0], device="cuda")
        torch.cuda.synchronize()
    assert waits == ["numbers are copied from the host", "torch.cuda.synchronize"]
    assert torch.cuda.synchronize.__module__ == "torch.cuda"  # the stand-ins are gone


def test_an_operation_without_a_cost_is_an_error() -> None:
    with pytest.raises(UnknownOperationError, match="aten::fft_fft has no registered cost"):
        cost_of("aten::fft_fft", (), None)


def test_the_cost_of_a_product_is_its_textbook_one() -> None:
    left, right = torch.empty(3, 5, dtype=torch.bfloat16), torch.empty(5, 7, dtype=torch.bfloat16)
    cost = cost_of("aten::mm", (left, right), left @ right)
    assert (cost.flops, cost.moved, cost.unit) == (2 * 3 * 5 * 7, 2 * (15 + 35 + 21), "gemm")


def test_the_vocabulary_must_be_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match=r"pass data\.vocab_size=N"):
        main(["quickstart.toml", "--simulate", "h100"])
