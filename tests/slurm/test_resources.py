"""Whatever sbatch is given for GPUs and CPUs, every rank gets those of its node: on real Slurm."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slurm_cluster import CPUS_PER_NODE, GPUS_PER_NODE, SlurmCluster

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "slurm" / "train.sbatch")
ALL_GPUS = ",".join(map(str, range(GPUS_PER_NODE)))

# Stands for Python: answers as pretrain.outcome does, and writes down what ranks and launchers get.
INTERPRETER = """#!/usr/bin/env bash
case "$*" in
    *"--dry-run"*) ;;
    *"pretrain.outcome --directory"*) echo "$FOLDER" ;;
    *"pretrain.outcome"*) echo finished ;;
    *)
        [[ "$*" =~ --nproc-per-node\\ ([0-9]+) ]] && ranks=${BASH_REMATCH[1]} || ranks=1
        echo "$SLURMD_NODENAME ranks=$ranks gpus=${CUDA_VISIBLE_DEVICES:-none}" \\
            "cpus=$(env -u OMP_NUM_THREADS nproc)" > "$FOLDER/seen_$SLURM_PROCID"
        ;;
esac
"""


@pytest.fixture(scope="module")
def binding_slurm(slurm: SlurmCluster) -> Iterator[SlurmCluster]:
    """Start a cluster that binds tasks to cores where nothing else is requested."""
    with SlurmCluster("TaskPlugin=task/affinity\nTaskPluginParam=autobind=cores\n") as cluster:
        yield cluster


def submit(slurm: SlurmCluster, folder: Path, *options: str, **environment: str) -> list[str]:
    """Run the job script with a stand-in for Python; what its launchers or ranks have seen."""
    interpreter = folder / "python"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    job = slurm.submit(
        *("--nodes=2", f"--output={folder}/job.log", *options, SCRIPT, "config.toml"),
        **({"PYTHON": str(interpreter), "PREFLIGHT": "off", "FOLDER": str(folder)} | environment),
        cwd=ROOT,
    )
    assert slurm.wait(job) == "COMPLETED", (folder / "job.log").read_text()
    return [path.read_text().strip() for path in sorted(folder.glob("seen_*"))]


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
@pytest.mark.parametrize(
    "options",
    [
        [f"--gpus-per-node={GPUS_PER_NODE}"],
        [f"--gpus={2 * GPUS_PER_NODE}"],
        [f"--gres=gpu:{GPUS_PER_NODE}"],
        ["--gpus-per-task=1", f"--ntasks-per-node={GPUS_PER_NODE}"],
        [f"--gpus-per-node={GPUS_PER_NODE}", "--gpu-bind=single:1"],
        [f"--gpus-per-node={GPUS_PER_NODE}", "--gpu-bind=closest"],
        ["--exclusive"],
    ],
    ids=" ".join,
)
def test_every_rank_sees_the_gpus_of_its_node(
    slurm: SlurmCluster, tmp_path: Path, launcher: str, options: list[str]
) -> None:
    seen = [line.split() for line in submit(slurm, tmp_path, *options, LAUNCHER=launcher)]
    tasks, ranks = (1, GPUS_PER_NODE) if launcher == "torchrun" else (GPUS_PER_NODE, 1)
    assert [line[0] for line in seen] == ["n1"] * tasks + ["n2"] * tasks
    assert all(line[1:3] == [f"ranks={ranks}", f"gpus={ALL_GPUS}"] for line in seen), seen


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
@pytest.mark.parametrize("inherited", ["", str(CPUS_PER_NODE)])
def test_every_rank_may_use_the_cpus_of_its_node(
    binding_slurm: SlurmCluster, tmp_path: Path, launcher: str, inherited: str
) -> None:
    """Slurm from 23.11 on hands `--cpus-per-task` to srun, as the variable does in any version."""
    seen = submit(
        binding_slurm,
        tmp_path,
        *("--exclusive", f"--cpus-per-task={CPUS_PER_NODE}"),
        LAUNCHER=launcher,
        **({"SRUN_CPUS_PER_TASK": inherited} if inherited else {}),
    )
    assert len(seen) == (2 if launcher == "torchrun" else 2 * GPUS_PER_NODE)
    num_cpus = min(
        len(os.sched_getaffinity(0)), CPUS_PER_NODE
    )  # Slurm does not count the real ones
    assert all(line.endswith(f"cpus={num_cpus}") for line in seen), seen
