"""Steps measured by `pretrain.bench` on the CPU, alone and on two ranks under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_eso.benchmark.device_work import Work, measure_exposed
from megatron_eso.simulation.parts import HEAD, OPTIMIZER, PRODUCTS
from tests.support.processes import HANG_SECONDS
from tests.support.torchrun import LAUNCHER
from tests.support.training import DISTRIBUTED, PP2, TINY, Overrides, tiny_arguments

PARTS = {PRODUCTS, HEAD, OPTIMIZER, "norms", "attention within streams", "attention of queries"}
STEPS = ["--warmup-steps=1", "--steps=2", "--json"]


def measure(launcher: tuple[str, ...], arguments: list[str]) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, *launcher, "-m", "pretrain.bench", *arguments, *STEPS],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout)  # type: ignore[no-any-return]


def drawn(overrides: Overrides) -> list[str]:
    values = TINY | {"data.train": '"nowhere"', "data.vocab_size": 97} | overrides
    return [f"{key}={value}" for key, value in ({"run.directory": '"x"'} | values).items()]


def test_one_rank_with_drawn_tokens(tmp_path: Path) -> None:
    found = measure((), [*drawn({}), f"--profile={tmp_path / 'traces'}"])
    assert not found["simulated"]
    assert found["world_size"] == 1
    assert found["timed_steps"] == 2
    assert found["skipped_updates"] == 0
    assert found["mfu"] == {}
    assert found["host_waits"] == []
    parts = {part["part"]: part for part in found["parts"]}
    assert parts.keys() >= PARTS
    # The same parts once in a step, and with the same FLOPs, as in a simulation.
    assert parts[OPTIMIZER]["per"] == "step"
    assert parts[PRODUCTS]["per"] == "micro-batch"
    assert parts[PRODUCTS]["flops"] > 0
    held = found["memory"]["between_steps"]
    assert held.keys() >= {"weights", "gradients", "optimizer", "EMA"}
    assert found["memory"]["peak"] > sum(held.values())
    trace = json.loads((tmp_path / "traces" / "rank_0.pt.trace.json").read_text())
    assert {event.get("name") for event in trace["traceEvents"]} >= PARTS


def test_two_ranks_with_real_data(tmp_path: Path, tiny_data: Path) -> None:
    arguments = tiny_arguments(tmp_path / "run", tiny_data, PP2 | {"train.num_steps": 3})
    found = measure(LAUNCHER, [*arguments, "--real-data"])
    assert found["world_size"] == 2
    collectives = {(each["name"], each["purpose"]) for each in found["collectives"]}
    assert collectives & {("send", "pipeline"), ("receive", "pipeline")}
    assert all(each["ranks"] <= 2 for each in found["collectives"])
    assert not (tmp_path / "run").exists()


def test_two_ranks_that_share_the_optimizer() -> None:
    found = measure(LAUNCHER, drawn(DISTRIBUTED))
    gathers = [each for each in found["collectives"] if each["name"] == "all-gather"]
    assert {each["purpose"] for each in gathers} == {"data"}
    assert any(each["seconds"] > 0 for each in gathers)


@pytest.mark.parametrize(
    ("kernels", "collectives", "exposed"),
    [
        ([(0, 4)], [(1, 3)], {}),
        ([(0, 2)], [(1, 5)], {"first": 3}),
        ([(0, 1), (3, 4)], [(0, 3), (2, 5)], {"first": 2, "second": 1}),
        ([], [(0, 3), (2, 5)], {"first": 3, "second": 2}),
    ],
)
def test_time_of_collectives_without_kernels(
    kernels: list[tuple[int, int]],
    collectives: list[tuple[int, int]],
    exposed: dict[str, int],
) -> None:
    names = ("first", "second")
    found = measure_exposed(
        [Work("kernel", *span) for span in kernels],
        [Work(name, *span) for name, span in zip(names, collectives, strict=False)],
    )
    assert {label: seconds for label, seconds in found.items() if seconds} == exposed
