"""An array of build jobs and their merge on real Slurm give the bytes of one build."""

import os
import sys
from pathlib import Path

import pytest

from data_tools.__main__ import main as data_tools
from tests.support.slurm_cluster import SlurmCluster

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "slurm" / "build_shards.sbatch")
NUM_PARTS = 2


def read_files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.slow
def test_array_and_merge_build_the_same_bytes(
    slurm: SlurmCluster, tiny_data: Path, tmp_path: Path
) -> None:
    folder = tiny_data.parent
    arguments = ["--input", str(folder / "texts"), "--tokenizer", str(folder / "tokenizer")]
    arguments += ["--validation", "0.1"]
    data_tools(["build", *arguments, "--out", str(tmp_path / "whole")])
    log, out = f"--output={tmp_path}/job_%j.log", tmp_path / "parts"
    common = {"cwd": ROOT, "PYTHON": sys.executable, "PYTHONPATH": os.fspath(ROOT)}
    array = slurm.submit(
        f"--array=0-{NUM_PARTS - 1}", log, SCRIPT, *arguments, "--out", str(out), **common
    )
    after = (f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes")
    merge = slurm.submit(*after, log, SCRIPT, "merge", str(out), **common)
    state = slurm.wait(merge)
    logs = "".join(path.read_text() for path in tmp_path.glob("job_*.log"))
    assert state == "COMPLETED", logs
    assert read_files(out) == read_files(tmp_path / "whole")
