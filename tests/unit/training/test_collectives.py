"""The last collectives of ranks that hang, as the watchdog writes them for torchfrtrace."""

import os
import pickle
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.flight_recorder.components.loader import read_dir

from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.training.guards.watchdog import COLLECTIVES_PREFIX
from tests.support.processes import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[3]
DEADLINE_SECONDS, LOOK_SECONDS = 2.0, 0.2

# Rank 0 reduces once more than rank 1, which waits for a message that never comes.
PROGRAM = f"""
import sys
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.training.guards.watchdog import Watchdog

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
hang = timedelta(seconds={HANG_SECONDS})
store = dist.FileStore(str(folder / "store"), 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=hang)
watchdog = Watchdog(RunDirectory(folder).log_of_rank(rank), {{"train step": {DEADLINE_SECONDS}}},
    interval_seconds={LOOK_SECONDS}, grace_seconds=hang.total_seconds(), rank=rank, num_ranks=2,
    store=store)
with watchdog, watchdog.deadline("train step", "7"):
    dist.all_reduce(torch.ones(3))
    if rank == 0:
        dist.all_reduce(torch.ones(5))
    store.wait(["never"], hang)
"""


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the logs of two ranks that hang in different collectives."""
    folder = tmp_path_factory.mktemp("hung")
    run = RunDirectory(folder)
    run.logs.mkdir()
    environment = os.environ | {"TORCH_FR_BUFFER_SIZE": "2000", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), str(rank)],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, report = rank.communicate(timeout=HANG_SECONDS)
            assert rank.returncode == 1, report
            assert "in 'train step 7' for" in report
    finally:
        for rank in ranks:
            rank.kill()
    return run.logs


def read_entries(logs: Path, rank: int) -> list[dict[str, Any]]:
    name = f"{COLLECTIVES_PREFIX}{RunDirectory(logs.parent).log_of_rank(rank).stem}"
    entries: list[dict[str, Any]] = pickle.loads((logs / name).read_bytes())["entries"]
    return entries


def test_each_rank_writes_its_last_collectives(logs: Path) -> None:
    sizes = [[entry["input_sizes"] for entry in read_entries(logs, rank)] for rank in range(2)]
    assert sizes == [[[[3]], [[5]]], [[[3]]]]


def test_torchfrtrace_finds_the_files_as_the_guide_calls_it(logs: Path) -> None:
    """Its reader; what it does next fails on the names of gloo's groups."""
    guide = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    (prefix,) = re.findall(r"torchfrtrace RUN_DIR/logs --prefix (\w+)`", guide)
    found, _ = read_dir(Namespace(trace_dir=str(logs), prefix=prefix))
    assert sorted((each["rank"], len(each["entries"])) for each in found.values()) == [
        (0, 2),
        (1, 1),
    ]
