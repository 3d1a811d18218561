"""Datasets on a loopback server, and a cache for their shards."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_eso.data.remote import folder as remote_folder
from megatron_eso.data.remote.cache import ShardCache
from tests.support.file_server import FileServer, serve_folder
from tests.support.remote_shards import (
    AMPLE_GIB,
    NUM_TOKENS,
    RECORD_TOKENS,
    SHARD_RECORDS,
    MakeDataset,
)


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory, make_dataset: MakeDataset) -> Path:
    """Write datasets `a` and `b`, whose shards differ under equal names, and a small `c`."""
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
