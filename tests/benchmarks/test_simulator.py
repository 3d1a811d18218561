"""Simulated steps of the shipped configurations at whole depth, and the dry run's memory."""

import json
import subprocess
import sys

import pytest

from megatron_eso.estimates.memory import estimate_stages
from megatron_eso.quantities import GIB
from tests.support.planning import objective_of
from tests.support.processes import HANG_SECONDS
from tests.support.shipped import MODELS, VOCABULARY, load_shipped

TOLERANCE = 0.05
CELLS = {
    "quickstart": (2, ("quickstart.toml",)),
    **{name: (64, (*layers, "scale/64.toml")) for name, layers in MODELS.items()},
}


@pytest.mark.bench
@pytest.mark.parametrize("name", CELLS)
def test_the_simulated_step_of_a_shipped_configuration(name: str) -> None:
    # The fake GPU needs a process of its own.
    world_size, layers = CELLS[name]
    command = [sys.executable, "-m", "pretrain.bench", *layers, f"data.vocab_size={VOCABULARY}"]
    finished = subprocess.run(
        [*command, "--simulate=h100", f"--world-size={world_size}", "--json"],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(finished.stdout)
    # The dry run's memory of the stage with the highest simulated peak.
    config = load_shipped(*layers)
    parallel, memory = config.parallel, figures["memory"]
    data_parallel_size = world_size // parallel.model_parallel_size
    stage = memory["rank"] * parallel.pipeline_model_parallel_size // world_size
    stages = estimate_stages(config, VOCABULARY, objective_of(config), data_parallel_size)
    ratio = stages[stage].total / memory["peak"]
    mfu = figures["mfu"]
    print(
        f"{name}, {world_size} x h100, simulated: MFU {mfu['kernels']:.1%} of the kernels, "
        f"{mfu['with_bubble']:.1%} of a step; {memory['peak'] / GIB:.2f} GiB, of which the dry "
        f"run states {ratio:.3f}; {figures['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU"
    )
    assert ratio == pytest.approx(1, rel=TOLERANCE)
