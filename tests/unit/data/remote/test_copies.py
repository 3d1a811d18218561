"""Copies of all shards of a run before its first step, by one process and by several of a node."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_eso.config.model import ModelConfig
from megatron_eso.config.sections import Config, DataConfig, OptimizerConfig, RunConfig, TrainConfig
from megatron_eso.data.remote.cache import ShardCache
from megatron_eso.data.remote.copies import copy_shards
from megatron_eso.data.remote.datasets import open_dataset
from megatron_eso.data.samples.training_data import TrainingData
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.errors import ConfigError, DataError
from tests.support.file_server import Fault, FileServer, serve_folder
from tests.support.processes import HANG_SECONDS
from tests.support.remote_shards import (
    AMPLE_GIB,
    LENGTH,
    list_files,
)

ROOT = Path(__file__).resolve().parents[4]


def test_a_run_over_urls_is_that_over_local_shards(
    server: FileServer, corpora: Path, tmp_path: Path
) -> None:
    def configure(a: str, b: str) -> Config:
        return Config(
            run=RunConfig(directory="runs/x"),
            model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
            data=DataConfig(
                train=(a, b),
                train_weights=(1.0, 2.0),
                sequence_length=LENGTH,
                cache_directory=str(tmp_path / "cache"),
                cache_gib=AMPLE_GIB,
            ),
            train=TrainConfig(num_steps=1, global_batch_size=8, micro_batch_size=8),
            optimizer=OptimizerConfig(learning_rate=1e-3),
        )

    def open_data(config: Config) -> TrainingData:
        return TrainingData.open(config.data, config.run.seed)

    # The samples and the state are equal to those of local shards.
    remote = open_data(configure(f"{server.url}/a", f"{server.url}/b"))
    local = open_data(configure(str(corpora / "a"), str(corpora / "b")))
    copy_shards(remote.sources)
    samples = np.arange(500)
    assert np.array_equal(remote.rows(samples), local.rows(samples))
    assert remote.state == local.state
    # A run may continue from another URL, but not with another dataset at its URL.
    resumed: dict[str, Any] = {"consumed_samples": 8, "source": "runs/x"}
    shutil.copytree(corpora / "a", tmp_path / "served")
    with serve_folder(tmp_path / "served") as other:
        config = configure(other.url, f"{server.url}/b")
        open_data(config).resume(remote.state, **resumed)
        shutil.copytree(corpora / "c", tmp_path / "served", dirs_exist_ok=True)
        with pytest.raises(ConfigError, match="data.phase"):
            open_data(config).resume(remote.state, **resumed)


def test_a_shard_of_another_size_is_found_at_the_start(
    corpora: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = tmp_path / "served"
    shutil.copytree(corpora / "a", served)
    cache = ShardCache.at(str(tmp_path / "cache"), 300_000 / 2**30)
    with serve_folder(served) as server:
        dataset = open_dataset(server.url, cache=cache)
        copy_shards([dataset.shards])
        assert re.search("the shards take .* GiB, data.cache_gib = .*raise", caplog.text)
        os.truncate(served / "shard-00006.tar", 5000)
        with pytest.raises(DataError, match="shard-00006.tar has 5000 bytes"):
            copy_shards([dataset.shards])


WORKER = """
import hashlib, sys
import numpy as np
from megatron_eso.data.remote.datasets import open_dataset
from megatron_eso.data.remote.cache import ShardCache
from megatron_eso.data.remote.copies import copy_shards
url, cache, length, first = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "first"
dataset = open_dataset(url, cache=ShardCache.at(cache, 0.1))
print("open", flush=True)
if first:
    copy_shards([dataset.shards])
print(hashlib.sha256(dataset.rows(np.arange(dataset.num_rows(length)), length)).hexdigest())
"""

Worker = subprocess.Popen[str]


@pytest.fixture
def start_worker(server: FileServer, cache: ShardCache) -> Iterator[Callable[[str], Worker]]:
    """Return a function that starts a process, which copies corpus `a` "first" or row by row."""
    workers: list[Worker] = []

    def start(when: str) -> Worker:
        arguments = [f"{server.url}/a", str(cache.directory), str(LENGTH), when]
        command = [sys.executable, "-c", WORKER, *arguments]
        workers.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()
        worker.communicate()


def finish_worker(worker: Worker) -> str:
    output, _ = worker.communicate(timeout=HANG_SECONDS)
    assert worker.returncode == 0
    return output.split()[-1]


def hash_rows(directory: Path) -> str:
    dataset = TokenDataset.open(directory)
    return hashlib.sha256(dataset.rows(np.arange(dataset.num_rows(LENGTH)), LENGTH)).hexdigest()


def test_processes_of_a_node_download_each_shard_once(
    server: FileServer,
    corpora: Path,
    cache: ShardCache,
    start_worker: Callable[[str], Worker],
) -> None:
    names = [f"a/{path.name}" for path in (corpora / "a").glob("*.tar")]
    for name in names:
        server.fail(name, Fault(pause_seconds=0.3))
    workers = [start_worker(when) for when in ("first", "late") * 2]
    assert {finish_worker(worker) for worker in workers} == {hash_rows(corpora / "a")}
    assert {server.num_requests[name] for name in names} == {1}
    assert server.num_requests["a/blocks.xxh3"] == 1
    assert len(list_files(cache.shards)) == len(names)


def test_a_killed_download_holds_up_no_other_process(
    server: FileServer,
    corpora: Path,
    cache: ShardCache,
    start_worker: Callable[[str], Worker],
) -> None:
    name = "a/shard-00004.tar"
    server.fail(name, Fault(pause_seconds=3600))
    victim, survivor = (start_worker("first") for _ in range(2))
    assert victim.stdout is not None
    assert survivor.stdout is not None
    assert victim.stdout.readline() == survivor.stdout.readline() == "open\n"
    deadline = time.monotonic() + HANG_SECONDS
    # The first process hangs in one shard; the other waits for it, or will wait soon.
    while sorted(path.suffix for path in list_files(cache.shards)) != [*[""] * 6, ".tmp"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (temporary,) = cache.shards.glob("*.tmp")
    locked = cache.directory / "locks" / temporary.name.partition(".")[0]
    holder = find_lock_holder(locked)
    if holder == survivor.pid:
        victim, survivor = survivor, victim
    assert holder == victim.pid
    time.sleep(0.3)
    victim.send_signal(signal.SIGKILL)
    assert finish_worker(survivor) == hash_rows(corpora / "a")
    assert not list(cache.shards.glob("*.tmp"))
    assert server.num_requests[name] == 2


def find_lock_holder(path: Path) -> int:
    inode = path.stat().st_ino
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if "->" not in fields and fields[1] == "FLOCK" and fields[5].endswith(f":{inode}"):
            return int(fields[4])
    raise AssertionError(f"nobody holds {path}")
