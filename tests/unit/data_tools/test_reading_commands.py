"""verify, inspect and bench as JSON, and on a dataset at a URL."""

import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from data_tools.__main__ import main
from data_tools.reports import reader_speed
from data_tools.reports.reader_speed import read_ahead, read_randomly
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.errors import DataError

Run = Callable[..., str]


@pytest.fixture(scope="module")
def folder(small_corpus: Path, tokenizer_directory: Path) -> Path:
    """Build a training and a validation split."""
    out = small_corpus.with_name("splits")
    main(
        [
            *("build", "--input", str(small_corpus), "--tokenizer", str(tokenizer_directory)),
            *("--out", str(out), "--workers", "1", "--validation", "0.2"),
            *("--record-tokens", "20000", "--shard-records", "2"),
        ]
    )
    return out


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def url(folder: Path) -> Iterator[str]:
    handler = partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_verify_as_json(folder: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    train, validation = json.loads(run("verify", folder, "--json"))["datasets"]
    dataset = TokenDataset.open(folder / "train")
    assert train == {
        "location": str(folder / "train"),
        "dataset_id": dataset.dataset_id,
        "num_shards": dataset.manifest.layout.num_shards,
        "num_tokens": dataset.num_tokens,
        "num_documents": dataset.manifest.num_documents,
        "problems": [],
    }
    assert validation["location"] == str(folder / "validation")
    shard = folder / "train" / "shard-00000.tar"
    content = shard.read_bytes()
    damaged = bytearray(content)
    for record in (0, 1):
        damaged[dataset.manifest.layout.record_offset(record)] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(DataError, match="2 problems, first: "):
        run("verify", folder, "--json")
    shard.write_bytes(content)
    train, validation = json.loads(capsys.readouterr().out)["datasets"]
    assert ["record 0000000" in problem for problem in train["problems"]] == [True, True]
    assert validation["problems"] == []


def test_a_url_gives_the_reports_of_its_directory(
    folder: Path, url: str, run: Run, tmp_path: Path
) -> None:
    cache = ("--cache-directory", tmp_path / "cache", "--cache-gib", 0.5)
    assert run("verify", url, *cache).count("intact") == 2
    for arguments in ([], ["--row", 3, "--sequence-length", 50]):
        there = json.loads(run("inspect", url, "--json", *cache, *arguments))["datasets"]
        here = json.loads(run("inspect", folder, "--json", *arguments))["datasets"]
        locations = [dataset.pop("location") for dataset in there]
        assert locations == [f"{url}/train", f"{url}/validation"]
        for dataset in (*here, *there):
            dataset.pop("location", None)
            # The lengths of a remote dataset are those of its first shard.
            dataset.pop("document_lengths", None)
        assert there == here


def test_bench_reads_in_every_way(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_speed, "SECONDS", 0.05)
    report = json.loads(run("bench", folder, "--sequence-length", 100, "--json"))
    assert report["location"] == str(folder / "train")
    for way in report["ways"]:
        assert way["megabytes_per_second"] == pytest.approx(way["tokens_per_second"] * 2 / 1e6)
        assert 0 < way["median_milliseconds"] <= way["p99_milliseconds"]
    shown = run("bench", folder, "--sequence-length", 100)
    assert all(way["way"] in shown for way in report["ways"])
    with pytest.raises(DataError, match="no data row of 20001 tokens"):
        run("bench", folder, "--sequence-length", 20001)


def test_reading_ahead_gives_the_same_rows_and_errors(folder: Path) -> None:
    dataset = TokenDataset.open(folder / "train")
    expected = read_randomly(dataset, 10, 3)
    found = read_ahead(read_randomly(dataset, 10, 3))
    for _ in range(20):
        assert np.array_equal(next(found), next(expected))
    found.close()

    def fail() -> Iterator[np.ndarray]:
        yield np.zeros(1)
        raise DataError("damaged")

    ahead = read_ahead(fail())
    next(ahead)
    with pytest.raises(DataError, match="damaged"):
        next(ahead)
