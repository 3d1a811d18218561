"""Datasets over HTTP: the tokens of the local dataset, and no token of a damaged or other file."""

import dataclasses
import shutil
import socket
import sys
from pathlib import Path

import pytest

from megatron_eso.data.remote import folder as remote_folder
from megatron_eso.data.remote.cache import ShardCache
from megatron_eso.data.remote.copies import copy_shards
from megatron_eso.data.remote.datasets import find_datasets, open_dataset
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.errors import ConfigError, DataError, OutageError
from tests.support.file_server import Fault, FileServer, serve_folder
from tests.support.remote_shards import (
    is_equal,
    list_files,
    read_all,
)


def test_rows_over_http_equal_those_on_disk(
    server: FileServer, corpora: Path, cache: ShardCache
) -> None:
    dataset = open_dataset(f"{server.url}/a/", cache=cache)
    assert not any(name.endswith(".tar") for name in server.num_requests)
    copy_shards([dataset.shards])
    names = [shard.name for shard in dataset.manifest.shards]
    assert len(names) == 7
    assert all(server.num_requests[f"a/{name}"] == 1 for name in names)
    assert is_equal(dataset, corpora / "a")
    for path in [path for path in list_files(corpora / "a") if path.suffix != ".tar"]:
        staged = dataset.directory / path.relative_to(corpora / "a")
        assert staged.read_bytes() == path.read_bytes()
    # Another start requests the manifest alone.
    server.num_requests.clear()
    again = open_dataset(f"{server.url}/a", cache=cache)
    copy_shards([again.shards])
    assert dict(server.num_requests) == {"a/manifest.json": 1}


def test_equally_named_shards_do_not_mix(
    server: FileServer, corpora: Path, cache: ShardCache
) -> None:
    datasets = [open_dataset(f"{server.url}/{name}", cache=cache) for name in "ab"]
    a, b = (dataset.manifest.shards for dataset in datasets)
    assert [shard.name for shard in a] == [shard.name for shard in b]
    assert not {shard.sha256 for shard in a} & {shard.sha256 for shard in b}
    copy_shards([dataset.shards for dataset in datasets])
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
    copy_shards([dataset.shards])
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
    with pytest.raises(DataError, match=rf"{server.url}/{name}: its sha256 is [0-9a-f]+.*3 att"):
        copy_shards([dataset.shards])
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
    with pytest.raises(DataError, match="HTTP status 403.*credentials") as refused:
        open_dataset(f"{server.url}/a", cache=cache)
    assert not isinstance(refused.value, OutageError)
    assert server.num_requests["a/manifest.json"] == 1
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a"
        with pytest.raises(OutageError, match=f"cannot read {url}/manifest.json.*7 attempts"):
            open_dataset(url, cache=cache)


def test_a_damaged_manifest_is_read_again(
    server: FileServer, corpora: Path, cache: ShardCache
) -> None:
    server.fail("a/manifest.json", Fault(flipped_byte=300), Fault(cut_at=300, is_short=True))
    dataset = open_dataset(f"{server.url}/a", cache=cache)
    assert dataset.dataset_id == TokenDataset.open(corpora / "a").dataset_id
    server.fail("a/manifest.json", *[Fault(flipped_byte=300)] * 3)
    with pytest.raises(DataError, match=r"a/manifest.json is damaged"):
        open_dataset(f"{server.url}/a", cache=cache)


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
        with serve_folder(served) as other, pytest.raises(DataError, match="is not the name of"):
            open_dataset(other.url, cache=cache)
