"""The pre-flight between real processes: what it accepts, and what it finds on which node."""

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.preflight.measurement import Measurement
from pretrain.preflight.node_facts import Facts
from pretrain.preflight.verdict import Limits, judge_facts, judge_measurements
from tests.support.processes import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]
# On a busy machine a rank may send its clock long after it has read it.
OPTIONS = ("--megabytes=1", f"--max-clock-skew={HANG_SECONDS:g}")
LIMITS = Limits(clock_skew_seconds=2.0, free_gib=1.0, bandwidth=0.0)


def fly(
    run_directories: list[Path], roots: list[Path], *options: str
) -> tuple[list[int], list[str], str]:
    """Run one rank on each of two nodes; exit codes, rank 0's lines and all errors."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "pretrain.preflight", str(run), *OPTIONS, *options],
            cwd=root,
            env=os.environ
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
            | {"RANK": str(rank), "SLURMD_NODENAME": f"n{rank + 1}", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (run, root) in enumerate(zip(run_directories, roots, strict=True))
    ]
    outputs = [rank.communicate(timeout=HANG_SECONDS) for rank in ranks]
    return (
        [rank.returncode for rank in ranks],
        outputs[0][0].splitlines(),
        outputs[0][1] + outputs[1][1],
    )


@pytest.mark.slow
def test_two_equal_nodes_pass(tmp_path: Path) -> None:
    codes, lines, _ = fly([tmp_path, tmp_path], [ROOT, ROOT], "--min-free-gib=0")
    assert codes == [0, 0]
    assert [line.split(":")[0] for line in lines] == ["node n1", "node n2"]
    assert all("all-reduce exact" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_other_code_on_a_node_is_found(tmp_path: Path) -> None:
    other = tmp_path / "other"
    for package in ("pretrain", "megatron_eso"):
        shutil.copytree(ROOT / package, other / package)
    with (other / "megatron_eso" / "errors.py").open("a") as stream:
        stream.write("\n")
    codes, _, error = fly([tmp_path, tmp_path], [ROOT, other], "--min-free-gib=0")
    assert codes == [1, 0]
    assert "error: node n2: megatron-eso " in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_run_directory_that_is_not_shared_is_found(tmp_path: Path) -> None:
    codes, _, error = fly([tmp_path / "1", tmp_path / "2"], [ROOT, ROOT], "--min-free-gib=0")
    assert codes == [1, 0]
    assert error == ("error: node n2: does not share the run directory with the first node\n")


def node(name: str, **changes: object) -> Facts:
    facts = Facts(
        node=name,
        num_ranks=8,
        num_gpus=8,
        gpu="GPU",
        versions={"python": "3.12.1", "torch": "2.13"},
        free_gib=100.0,
        disk_error="",
    )
    return dataclasses.replace(facts, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"num_gpus": 7}, "node n2: GPUs 7, elsewhere 8"),
        ({"num_gpus": 7}, "node n2: 8 ranks on 7 GPUs"),
        ({"gpu": "another"}, "node n2: the GPU another, elsewhere GPU"),
        (
            {"versions": {"python": "3.12.1", "torch": "2.12"}},
            "node n2: torch 2.12, elsewhere 2.13",
        ),
        (
            {"free_gib": 0.5},
            "node n2: 0.5 GiB free for the run directory, needs 1 (--min-free-gib)",
        ),
        ({"disk_error": "cannot write into runs"}, "node n2: cannot write into runs"),
    ],
)
def test_the_node_that_differs_is_named(changes: dict[str, object], fault: str | None) -> None:
    found = judge_facts([node("n1"), node("n2", **changes), node("n3")], LIMITS)
    assert (found == []) if fault is None else (fault in found)
    assert all(each.startswith("node n2: ") for each in found)


@pytest.mark.parametrize(
    ("measurement", "fault"),
    [
        (Measurement(node="n2", bandwidth=3.0), None),
        (Measurement(node="n2", bandwidth=3.0, clock_skew_seconds=-7.0), "clock off by -7 s"),
        (Measurement(node="n2", bandwidth=3.0, is_sum_exact=False), "all-reduce gives a wrong sum"),
        (Measurement(node="n2", error="timed out"), "all-reduce failed: timed out"),
        (Measurement(node="n2", bandwidth=0.5), "all-reduce at 0.50 GB/s, needs 1"),
    ],
)
def test_measurements_are_held_to_limits(measurement: Measurement, fault: str | None) -> None:
    limits = dataclasses.replace(LIMITS, bandwidth=1.0)
    found = judge_measurements([Measurement(node="n1", bandwidth=3.0), measurement], limits)
    assert len(found) == (fault is not None)
    if fault is not None:
        assert found[0].startswith(f"node n2: {fault}")
