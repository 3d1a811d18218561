"""The pre-flight between real processes: what it accepts, and what it finds on which node."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.processes import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]
# On a busy machine a rank may send its clock long after it has read it.
OPTIONS = ("--megabytes=1", f"--max-clock-skew={HANG_SECONDS:g}")


@dataclass(frozen=True)
class Rank:
    """Where and how one rank starts."""

    node: str
    local_rank: int
    run: Path
    root: Path = ROOT
    gpus_of_job: str = ""


def fly(ranks: Sequence[Rank], *options: str) -> tuple[list[int], list[str], str]:
    """Run the ranks; exit codes, rank 0's lines and all errors."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "pretrain.preflight", str(each.run), *OPTIONS, *options],
            cwd=each.root,
            env=os.environ
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(len(ranks))}
            | {"RANK": str(rank), "LOCAL_RANK": str(each.local_rank), "OMP_NUM_THREADS": "1"}
            | {"SLURMD_NODENAME": each.node, "PYTHONPATH": str(each.root)}
            | ({"SLURM_GPUS_ON_NODE": each.gpus_of_job} if each.gpus_of_job else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, each in enumerate(ranks)
    ]
    outputs = [process.communicate(timeout=HANG_SECONDS) for process in processes]
    errors = "".join(error for _, error in outputs)
    return [process.returncode for process in processes], outputs[0][0].splitlines(), errors


@pytest.mark.slow
def test_equal_nodes_pass_and_are_measured(tmp_path: Path) -> None:
    ranks = [Rank(node, local, tmp_path) for node in ("n1", "n2") for local in range(2)]
    codes, lines, error = fly(ranks, "--min-free-gib=0")
    assert (codes, error) == ([0] * 4, "")
    starts = ["node n1", "node n2", "between nodes", "all 4 ranks"]
    assert [line.split(":")[0] for line in lines] == starts
    for line in lines[:2]:
        assert "2 ranks | no GPU" in line
        assert "matrix products" in line
        assert "all-reduce within the node" in line
    assert "1 pairs, median" in lines[2]
    assert "all-reduce exact" in lines[3]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_other_code_on_a_node_is_found(tmp_path: Path) -> None:
    other = tmp_path / "other"
    for package in ("pretrain", "megatron_eso"):
        shutil.copytree(ROOT / package, other / package)
    with (other / "megatron_eso" / "errors.py").open("a") as stream:
        stream.write("\n")
    ranks = [Rank("n1", 0, tmp_path), Rank("n2", 0, tmp_path, root=other)]
    codes, _, error = fly(ranks, "--min-free-gib=0")
    assert codes == [1, 0]
    assert "error: node n2: megatron-eso " in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_run_directory_that_is_not_shared_is_found(tmp_path: Path) -> None:
    ranks = [Rank("n1", 0, tmp_path / "1"), Rank("n2", 0, tmp_path / "2")]
    codes, _, error = fly(ranks, "--min-free-gib=0")
    assert codes == [1, 0]
    assert error == "error: node n2: does not share the run directory with the first node\n"


@pytest.mark.slow
def test_job_with_gpus_that_torch_does_not_see_fails(tmp_path: Path) -> None:
    ranks = [Rank(node, 0, tmp_path, gpus_of_job="8") for node in ("n1", "n2")]
    codes, lines, error = fly(ranks, "--min-free-gib=0")
    assert codes == [1, 0]
    assert (
        "error: node n1: torch sees none of 8 GPUs: a CPU build of torch, the driver, or" in error
    )
    assert "node n2: torch sees none of 8 GPUs" in error
    assert len(lines) == 2
