"""The cache of remote shards: bounded, shared by threads, and refused where it cannot be used."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_eso.data.remote.cache import ShardCache
from megatron_eso.data.remote.copies import copy_shards
from megatron_eso.data.remote.datasets import open_dataset
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.errors import ConfigError, DataError, UserError
from tests.support.file_server import FileServer
from tests.support.remote_shards import (
    LENGTH,
    is_equal,
    list_files,
    read_all,
)


def test_a_damaged_copy_is_made_anew(server: FileServer, corpora: Path, cache: ShardCache) -> None:
    dataset = open_dataset(f"{server.url}/a", cache=cache, retry_seconds=(0.0, 0.0))
    copy_shards([dataset.shards])
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
        with cache.lock("cache"):  # nothing is added or removed meanwhile; a file may be renamed
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
    # The file is removed, and a process that has it open still reads all of it.
    assert not (cache.shards / files[0].sha256).exists()
    assert os.pread(held, 2 * shard_bytes, 0) == (corpora / "a" / files[0].name).read_bytes()
    os.close(held)


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
