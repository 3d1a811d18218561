"""Remote shards: real servers on loopback, the tokens of the local dataset, nothing else ever."""

import dataclasses
import hashlib
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pytest

from megatron_eso.config.model import ModelConfig
from megatron_eso.config.sections import Config, DataConfig, OptimizerConfig, RunConfig, TrainConfig
from megatron_eso.data.remote import folder as remote_folder
from megatron_eso.data.remote.cache import ShardCache
from megatron_eso.data.remote.datasets import find_datasets, open_dataset
from megatron_eso.data.remote.staging import stage_shards
from megatron_eso.data.samples.training_data import TrainingData
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.errors import ConfigError, DataError, UserError
from tests.support.file_server import Fault, FileServer, serve_folder
from tests.support.processes import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[4]
INTEROP = ROOT / ".venv-interop/bin/python"
MakeDataset = Callable[..., npt.NDArray[np.int64]]

LENGTH = 100
RECORD_TOKENS = 20_000
SHARD_RECORDS = 3
NUM_TOKENS = 7 * SHARD_RECORDS * RECORD_TOKENS  # 7 shards of some 120 KB
AMPLE_GIB = 0.1


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory, make_dataset: MakeDataset) -> Path:
    """Datasets whose shards have the same names and other tokens: `a` and `b`, and a small `c`."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, num_tokens in {"a": NUM_TOKENS, "b": NUM_TOKENS - 1, "c": 50_000}.items():
        make_dataset(folder / name, num_tokens, RECORD_TOKENS, shard_records=SHARD_RECORDS)
    return folder


@pytest.fixture
def server(corpora: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(remote_folder, "FIRST_WAIT_SECONDS", 0.01)
    with serve_folder(corpora) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache.at(str(tmp_path / "cache"), AMPLE_GIB)


def read_all(dataset: TokenDataset, seed: int = 0) -> npt.NDArray[np.int64]:
    """All rows, asked for in random order, in the dataset's order."""
    order = np.random.default_rng(seed).permutation(dataset.num_rows(LENGTH))
    rows = np.empty((len(order), LENGTH), dtype=np.int64)
    for part in np.array_split(order, 20):
        rows[part] = dataset.rows(part, LENGTH)
    return rows


def is_equal(remote: TokenDataset, local: Path) -> bool:
    dataset = TokenDataset.open(local)
    return remote.dataset_id == dataset.dataset_id and np.array_equal(
        read_all(remote), read_all(dataset)
    )


def list_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_rows_over_http_equal_those_on_disk(
    server: FileServer, corpora: Path, cache: ShardCache
) -> None:
    dataset = open_dataset(f"{server.url}/a/", cache=cache)
    assert not any(name.endswith(".tar") for name in server.num_requests)
    stage_shards([dataset.shards])
    names = [shard.name for shard in dataset.manifest.shards]
    assert len(names) == 7
    assert all(server.num_requests[f"a/{name}"] == 1 for name in names)
    assert is_equal(dataset, corpora / "a")
    for path in [path for path in list_files(corpora / "a") if path.suffix != ".tar"]:
        staged = dataset.directory / path.relative_to(corpora / "a")
        assert staged.read_bytes() == path.read_bytes()
    # Another start asks for the manifest alone.
    server.num_requests.clear()
    again = open_dataset(f"{server.url}/a", cache=cache)
    stage_shards([again.shards])
    assert dict(server.num_requests) == {"a/manifest.json": 1}


def test_equally_named_shards_do_not_mix(
    server: FileServer, corpora: Path, cache: ShardCache
) -> None:
    datasets = [open_dataset(f"{server.url}/{name}", cache=cache) for name in "ab"]
    a, b = (dataset.manifest.shards for dataset in datasets)
    assert [shard.name for shard in a] == [shard.name for shard in b]
    assert not {shard.sha256 for shard in a} & {shard.sha256 for shard in b}
    stage_shards([dataset.shards for dataset in datasets])
    assert is_equal(datasets[0], corpora / "a")
    assert is_equal(datasets[1], corpora / "b")
    assert len(list_files(cache.shards)) == 14


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(flipped_byte=50_000)],
        [Fault(cut_at=50_000)],
        [Fault(cut_at=50_000, is_short=True), Fault(cut_at=0, is_short=True)],
        [Fault(status=503)] * 5,
        [Fault(status=429), Fault(cut_at=0), Fault(flipped_byte=0)],
    ],
)
def test_a_failed_download_is_repeated(
    server: FileServer, corpora: Path, cache: ShardCache, faults: list[Fault]
) -> None:
    server.fail("a/shard-00002.tar", *faults)
    dataset = open_dataset(f"{server.url}/a", cache=cache)
    stage_shards([dataset.shards])
    assert server.num_requests["a/shard-00002.tar"] == 1 + len(faults)
    assert is_equal(dataset, corpora / "a")


@pytest.mark.parametrize("place", [0, 700, 119_999])
def test_a_damaged_shard_is_never_delivered(
    server: FileServer, cache: ShardCache, place: int
) -> None:
    name = "a/shard-00001.tar"
    server.fail(name, *[Fault(flipped_byte=place)] * 100)
    dataset = open_dataset(f"{server.url}/a", cache=cache)
    expected = dataset.manifest.shards[1].sha256
    with pytest.raises(DataError, match=rf"{server.url}/{name}: its sha256 is [0-9a-f]+.*3 times"):
        stage_shards([dataset.shards])
    with pytest.raises(DataError, match=f"not the manifest's {expected}"):
        read_all(dataset)
    assert server.num_requests[name] == 2 * remote_folder.HASH_ATTEMPTS
    assert not (cache.shards / expected).exists()
    assert not list(cache.shards.glob("*.tmp"))


def test_refusals_name_the_url(server: FileServer, cache: ShardCache, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=f"{server.url}/absent/manifest.json: there is no such file"
    ):
        open_dataset(f"{server.url}/absent", cache=cache)
    assert server.num_requests["absent/manifest.json"] == 1
    for name in ("train", "validation"):
        shutil.copytree(server.folder / "a", tmp_path / name)
    with serve_folder(tmp_path) as split:
        parts = [f"{split.url}/train", f"{split.url}/validation"]
        with pytest.raises(DataError, match=f"several datasets; give {' or '.join(parts)}"):
            open_dataset(split.url, cache=cache)
        assert find_datasets(split.url) == parts
        assert find_datasets(parts[0]) == parts[:1]
    server.fail("a/manifest.json", Fault(status=403))
    with pytest.raises(DataError, match="HTTP status 403.*credentials"):
        open_dataset(f"{server.url}/a", cache=cache)
    assert server.num_requests["a/manifest.json"] == 1
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a"
        with pytest.raises(DataError, match=f"cannot read {url}/manifest.json.*asked 7 times"):
            open_dataset(url, cache=cache)


def test_a_damaged_manifest_is_asked_for_again(
    server: FileServer, corpora: Path, cache: ShardCache
) -> None:
    server.fail("a/manifest.json", Fault(flipped_byte=300), Fault(cut_at=300, is_short=True))
    dataset = open_dataset(f"{server.url}/a", cache=cache)
    assert dataset.dataset_id == TokenDataset.open(corpora / "a").dataset_id
    server.fail("a/manifest.json", *[Fault(flipped_byte=300)] * 3)
    with pytest.raises(DataError, match=r"a/manifest.json is damaged"):
        open_dataset(f"{server.url}/a", cache=cache)


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

    remote = open_data(configure(f"{server.url}/a", f"{server.url}/b"))
    local = open_data(configure(str(corpora / "a"), str(corpora / "b")))
    stage_shards(remote.sources)
    samples = np.arange(500)
    assert np.array_equal(remote.rows(samples), local.rows(samples))
    assert remote.state == local.state
    # The URL is not what counts, but what is there.
    resumed: dict[str, Any] = {"consumed_samples": 8, "source": "runs/x"}
    shutil.copytree(corpora / "a", tmp_path / "served")
    with serve_folder(tmp_path / "served") as other:
        config = configure(other.url, f"{server.url}/b")
        open_data(config).resume(remote.state, **resumed)
        shutil.copytree(corpora / "c", tmp_path / "served", dirs_exist_ok=True)
        with pytest.raises(ConfigError, match="data.phase"):
            open_data(config).resume(remote.state, **resumed)


def test_a_changed_dataset_has_another_id(corpora: Path, cache: ShardCache, tmp_path: Path) -> None:
    served = tmp_path / "served"
    with serve_folder(served) as server:
        ids = []
        for name in "ab":
            shutil.copytree(corpora / name, served, dirs_exist_ok=True)
            dataset = open_dataset(server.url, cache=cache)
            assert is_equal(dataset, corpora / name)
            ids.append(dataset.dataset_id)
    assert ids[0] != ids[1]


def test_a_shard_of_another_size_is_found_at_the_start(
    corpora: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = tmp_path / "served"
    shutil.copytree(corpora / "a", served)
    cache = ShardCache.at(str(tmp_path / "cache"), 300_000 / 2**30)
    with serve_folder(served) as server:
        dataset = open_dataset(server.url, cache=cache)
        stage_shards([dataset.shards])
        assert re.search("the shards take .* GiB, data.cache_gib = .*raise", caplog.text)
        os.truncate(served / "shard-00006.tar", 5000)
        with pytest.raises(DataError, match="shard-00006.tar has 5000 bytes"):
            stage_shards([dataset.shards])


def test_a_damaged_copy_is_made_anew(server: FileServer, corpora: Path, cache: ShardCache) -> None:
    dataset = open_dataset(f"{server.url}/a", cache=cache, retry_seconds=(0.0, 0.0))
    stage_shards([dataset.shards])
    flipped, shortened = dataset.manifest.shards[3:5]
    path = cache.shards / flipped.sha256
    content = bytearray(path.read_bytes())
    content[70_000] ^= 4
    path.write_bytes(content)
    os.truncate(cache.shards / shortened.sha256, 100_000)
    assert is_equal(dataset, corpora / "a")
    for file in dataset.manifest.shards:
        expected = 2 if file in (flipped, shortened) else 1
        assert server.num_requests[f"a/{file.name}"] == expected


def test_a_small_cache_stays_small(server: FileServer, corpora: Path, tmp_path: Path) -> None:
    shard_bytes = (corpora / "a/shard-00000.tar").stat().st_size
    bound = int(2.5 * shard_bytes)
    cache = ShardCache.at(str(tmp_path / "cache"), bound / 2**30)
    datasets = [open_dataset(f"{server.url}/{name}", cache=cache) for name in "ab"]
    expected = [read_all(TokenDataset.open(corpora / name)) for name in "ab"]
    sizes: list[int] = []
    problems: list[BaseException] = []

    def look() -> None:
        with cache.lock("cache"):  # nothing is added or removed meanwhile, but renamed it may be
            found = [status for _, status in cache._list_shards()]
        sizes.append(sum({status.st_ino: status.st_size for status in found}.values()))

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(8):
                number = int(random.integers(2))
                indices = random.integers(0, len(expected[number]), 3)
                rows = datasets[number].rows(indices, LENGTH)
                assert np.array_equal(rows, expected[number][indices])
                look()  # while the others read
        except BaseException as error:
            problems.append(error)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in readers:
        thread.start()
    for thread in readers:
        thread.join()
    assert problems == []
    assert len(sizes) == 24
    assert shard_bytes < max(sizes) <= bound


def test_the_shard_used_longest_ago_makes_room(
    server: FileServer, corpora: Path, tmp_path: Path
) -> None:
    shard_bytes = (corpora / "a/shard-00000.tar").stat().st_size
    cache = ShardCache.at(str(tmp_path / "cache"), 3.5 * shard_bytes / 2**30)
    shards = open_dataset(f"{server.url}/a", cache=cache).shards
    files = TokenDataset.open(corpora / "a").manifest.shards
    held = shards.open(0)
    for shard in (1, 2, 0, 3):
        os.close(shards.open(shard))
        time.sleep(0.01)
    assert {path.name for path in list_files(cache.shards)} == {
        files[shard].sha256 for shard in (0, 2, 3)
    }
    for shard in (4, 5, 6):
        os.close(shards.open(shard))
    # Removed, and still whole for who has it open.
    assert not (cache.shards / files[0].sha256).exists()
    assert os.pread(held, 2 * shard_bytes, 0) == (corpora / "a" / files[0].name).read_bytes()
    os.close(held)


WORKER = """
import hashlib, sys
import numpy as np
from megatron_eso.data.remote.datasets import open_dataset
from megatron_eso.data.remote.cache import ShardCache
from megatron_eso.data.remote.staging import stage_shards
url, cache, length, first = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "first"
dataset = open_dataset(url, cache=ShardCache.at(cache, 0.1))
print("open", flush=True)
if first:
    stage_shards([dataset.shards])
print(hashlib.sha256(dataset.rows(np.arange(dataset.num_rows(length)), length)).hexdigest())
"""


Worker = subprocess.Popen[str]


@pytest.fixture
def start_worker(server: FileServer, cache: ShardCache) -> Iterator[Callable[[str], Worker]]:
    """Starts a process that stages corpus `a` "first", or "late" as rows are read."""
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


def test_a_killed_download_holds_nobody_up(
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
    # Whoever came first hangs in one shard; the other waits for it, or is about to.
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


def test_remains_of_killed_processes_are_removed(
    server: FileServer, corpora: Path, cache: ShardCache
) -> None:
    cache.prepare()
    dead = [cache.shards / f"{'0' * 64}.x.tmp", cache.datasets / f"{'1' * 64}.x.tmp"]
    dead[0].write_bytes(b"half a shard")
    dead[1].mkdir()
    (dead[1] / "manifest.json").write_bytes(b"{")
    live = cache.shards / f"{'2' * 64}.x.tmp"
    live.write_bytes(b"half a shard")
    with cache.lock("2" * 64):
        dataset = open_dataset(f"{server.url}/a", cache=cache)
        assert not any(path.exists() for path in dead)
        assert live.exists()
        assert is_equal(dataset, corpora / "a")
        assert live.exists()
    open_dataset(f"{server.url}/a", cache=cache)
    assert not live.exists()


def test_removed_shards_do_not_keep_their_room(
    server: FileServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_eso.data.shards.sources._DROP_SECONDS", 0.0)
    dataset = open_dataset(f"{server.url}/a", cache=cache)
    last = dataset.num_rows(LENGTH) - 1
    dataset.rows(np.arange(last // 2), LENGTH)
    for path in list_files(cache.shards):
        path.unlink()
    dataset.rows(np.array([last]), LENGTH)
    is_open = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [
        name for name in is_open if name.startswith(str(cache.shards)) and "deleted" in name
    ]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("ftp://host/data", "ftp://host/data: give a folder, or a URL of s3://, gs://"),
        ("https://me:secret@host/data", "https://host/data: .* must hold no user, password"),
        ("https://host/data?sig=secret", "https://host/data: .* or query"),
        ("gs://bucket/data", r"gs://bucket/data needs gcsfs: pip install 'megatron-eso\[remote\]'"),
    ],
)
def test_urls_that_cannot_be_used(
    cache: ShardCache, monkeypatch: pytest.MonkeyPatch, location: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=message) as caught:
        open_dataset(location, cache=cache)
    assert "secret" not in str(caught.value)


def test_caches_that_cannot_be_used(server: FileServer, tmp_path: Path) -> None:
    def open_and_read(directory: str, gib: float) -> None:
        dataset = open_dataset(f"{server.url}/a", cache=ShardCache.at(directory, gib))
        dataset.rows(np.array([0]), LENGTH)

    (tmp_path / "file").touch()
    refused: list[tuple[str, float, type[UserError], str]] = [
        (str(tmp_path / "file"), 1.0, DataError, "data.cache_directory"),
        (str(tmp_path / "a"), 0.0, ConfigError, "data.cache_gib = 0"),
        (str(tmp_path / "b"), 1e-5, ConfigError, "data.cache_gib = 1e-05 is less than"),
    ]
    for directory, gib, kind, message in refused:
        with pytest.raises(kind, match=message):
            open_and_read(directory, gib)


def test_a_manifest_cannot_name_files_elsewhere(
    server: FileServer, cache: ShardCache, tmp_path: Path
) -> None:
    local = TokenDataset.open(server.folder / "a").manifest
    (file,) = local.tokenizer_files
    for name in ("../../planted", "/planted", ".."):
        files = (dataclasses.replace(file, name=name),)
        served = tmp_path / "served"
        shutil.copytree(server.folder / "a", served, dirs_exist_ok=True)
        (served / "manifest.json").write_bytes(
            dataclasses.replace(local, tokenizer_files=files).encode()
        )
        with serve_folder(served) as other, pytest.raises(DataError, match="is no name of"):
            open_dataset(other.url, cache=cache)


@pytest.fixture(scope="module")
def s3_url(corpora: Path) -> Iterator[str]:
    """A bucket with the corpora on moto's S3 server, a process; fsspec finds it by environment."""
    if not INTEROP.exists():
        reason = f"{INTEROP} is missing, which holds the S3 server: make test makes it"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = [str(INTEROP), "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process,
        pytest.MonkeyPatch.context() as environment,
    ):
        try:
            wait_for_port(port, process)
            environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            environment.setenv("AWS_ACCESS_KEY_ID", "user")
            environment.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
            environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
            files = fsspec.filesystem("s3")
            files.mkdir("bucket")
            files.put(str(corpora), "bucket/corpora", recursive=True)
            yield "s3://bucket/corpora"
        finally:
            process.kill()


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("moto's server does not start")


def test_rows_over_s3_equal_those_on_disk(
    s3_url: str, corpora: Path, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="megatron_eso")
    datasets = [open_dataset(f"{s3_url}/{name}", cache=cache) for name in "ab"]
    stage_shards([dataset.shards for dataset in datasets])
    for name, dataset in zip("ab", datasets, strict=True):
        assert is_equal(dataset, corpora / name)
    assert "staged" in caplog.text
    assert "secret-of-the-test" not in caplog.text
    assert dataset.shards.name(1) == f"{s3_url}/b/shard-00001.tar"
    assert find_datasets(f"{s3_url}/a") == [f"{s3_url}/a"]


def test_refusals_over_s3(s3_url: str, cache: ShardCache) -> None:
    for url in (f"{s3_url}/absent", "s3://no-such-bucket/a"):
        with pytest.raises(DataError, match=f"cannot read {url}/manifest.json: there is no such"):
            open_dataset(url, cache=cache)


def test_another_object_in_a_shards_place_is_refused(
    s3_url: str, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_folder, "FIRST_WAIT_SECONDS", 0.01)
    files = fsspec.filesystem("s3")
    files.copy("bucket/corpora/a", "bucket/mixed", recursive=True)
    files.copy("bucket/corpora/b/shard-00000.tar", "bucket/mixed/shard-00000.tar")
    dataset = open_dataset("s3://bucket/mixed", cache=cache)
    with pytest.raises(DataError, match="s3://bucket/mixed/shard-00000.tar: its sha256 is"):
        stage_shards([dataset.shards])
    files.pipe("bucket/mixed/shard-00000.tar", b"short")
    with pytest.raises(DataError, match="it has 5 bytes, not the manifest's"):
        stage_shards([dataset.shards])
