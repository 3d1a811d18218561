"""Shards on a real S3 server on loopback: moto, in a process."""

import logging
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from megatron_eso.data.remote import folder as remote_folder
from megatron_eso.data.remote.cache import ShardCache
from megatron_eso.data.remote.copies import copy_shards
from megatron_eso.data.remote.datasets import find_datasets, open_dataset
from megatron_eso.errors import DataError
from tests.support.processes import HANG_SECONDS
from tests.support.remote_shards import (
    is_equal,
)

ROOT = Path(__file__).resolve().parents[4]

INTEROP = ROOT / ".venv-interop/bin/python"


@pytest.fixture(scope="module")
def s3_url(corpora: Path) -> Iterator[str]:
    """Serve the corpora from a bucket of moto's S3 server; fsspec finds it by the environment."""
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
    copy_shards([dataset.shards for dataset in datasets])
    for name, dataset in zip("ab", datasets, strict=True):
        assert is_equal(dataset, corpora / name)
    assert "shards copied" in caplog.text
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
        copy_shards([dataset.shards])
    files.pipe("bucket/mixed/shard-00000.tar", b"short")
    with pytest.raises(DataError, match="it has 5 bytes, not the manifest's"):
        copy_shards([dataset.shards])
