"""The pre-flight as docs/cluster.md starts it by hand, on a real Slurm of two small nodes."""

import re
import sys
from pathlib import Path

import pytest

from tests.support.slurm_cluster import CPUS_PER_NODE, GPUS_PER_NODE, SlurmCluster

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_preflight_by_hand(slurm: SlurmCluster, tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^srun --nodes 2 .*?pretrain\.preflight [^\n]*", guide, re.M | re.S)
    for written, here in {
        ".venv/bin/python": sys.executable,
        "--gpus-per-node 8": "",  # there is no GPU, and the pre-flight would say so
        "--nproc-per-node 8": f"--nproc-per-node {GPUS_PER_NODE}",
        "--cpus-per-task 64": f"--cpus-per-task {CPUS_PER_NODE}",
        "HEAD_NODE": "127.0.0.1",
        "runs/first": f"{tmp_path}/run --megabytes 1 --min-free-gib 0",
    }.items():
        assert written in command
        command = command.replace(written, here)
    output = slurm.command("bash", "-c", command, cwd=ROOT, OMP_NUM_THREADS="1")
    lines = [line.split(":")[0] for line in output.splitlines()]
    assert lines == ["node n1", "node n2", "between nodes", f"all {2 * GPUS_PER_NODE} ranks"]
