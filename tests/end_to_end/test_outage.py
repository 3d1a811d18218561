"""An outage of remote storage ends a job, which the job script puts back into the queue."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_eso.data.shards.manifest import read_manifest
from megatron_eso.quantities import GIB
from megatron_eso.runs.run_directory import RunDirectory
from pretrain.outcome import judge
from tests.support.file_server import Fault, FileServer, serve_folder
from tests.support.processes import HANG_SECONDS
from tests.support.training import tiny_arguments

JOB = "17"
OUTAGE = [Fault(status=503)] * 1000

# The command, with short pauses between the attempts to read.
PROGRAM = """
from megatron_eso.data.remote import folder
from megatron_eso.errors import run_command
from pretrain.train import main
folder.FIRST_WAIT_SECONDS = 0.01
run_command(main)
"""


def train(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=os.environ | {"SLURM_JOB_ID": JOB},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


def configure(tiny_data: Path, folder: Path, server: FileServer) -> list[str]:
    """Return the command line of a run over a URL, whose cache is too small for all shards.

    The run therefore downloads a shard when it first reads it: the last one after a few steps.
    """
    sizes = [shard.bytes for shard in read_manifest(tiny_data / "train")[0].shards]
    overrides = {
        "data.train": json.dumps(f"{server.url}/train"),
        "data.cache_directory": json.dumps(str(folder / "cache")),
        "data.cache_gib": max(sizes) / GIB * 1.001,
        "train.num_steps": 20,
        "train.global_batch_size": 2,
        "train.micro_batch_size": 1,
        "checkpoint.interval": 1,
    }
    return tiny_arguments(folder / "run", tiny_data, overrides)


@pytest.mark.slow
def test_an_outage_of_the_storage_is_requeued(tiny_data: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with serve_folder(tiny_data) as server:
        arguments = configure(tiny_data, tmp_path, server)
        last_shard = max(path.name for path in (tiny_data / "train").glob("*.tar"))
        server.fail(f"train/{last_shard}", *OUTAGE)
        ended = train(arguments)
        # The command fails, and no line calls it a mistake of the user.
        assert ended.returncode == 1, ended.stderr
        assert "the server answers with HTTP status 503 (7 attempts)" in ended.stderr
        status = run.read_status()
        assert status is not None
        assert status.state == "failed"
        assert status.step > 0
        assert not run.failure.exists()
        outcome = judge(run, JOB)
        assert outcome.decision == "requeue"
        assert "HTTP status 503" in outcome.reason
        # Once the storage answers, the next job finishes the run.
        server.faults.clear()
        assert train(arguments).returncode == 0
        assert judge(run, JOB).decision == "finished"


def test_an_outage_at_the_start_is_requeued(tiny_data: Path, tmp_path: Path) -> None:
    with serve_folder(tiny_data) as server:
        arguments = configure(tiny_data, tmp_path, server)
        server.fail("train/manifest.json", *OUTAGE)
        assert train([*arguments, "--dry-run"]).returncode == 0
        assert train(arguments).returncode == 1
        assert judge(RunDirectory(tmp_path / "run"), JOB).decision == "requeue"


@pytest.mark.parametrize("status", [403, 404])
def test_a_refusal_of_the_storage_is_not_requeued(
    tiny_data: Path, tmp_path: Path, status: int
) -> None:
    with serve_folder(tiny_data) as server:
        arguments = configure(tiny_data, tmp_path, server)
        server.fail("train/manifest.json", *[Fault(status=status)] * 1000)
        assert train([*arguments, "--dry-run"]).returncode == 1
        assert train(arguments).returncode == 1
        assert judge(RunDirectory(tmp_path / "run"), JOB).decision == "stop"
