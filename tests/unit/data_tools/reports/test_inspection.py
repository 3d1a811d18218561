"""`inspect` reports counts, lengths and rows as they are in the texts."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_tools.__main__ import main
from data_tools.reports import document_lengths
from data_tools.reports.document_lengths import (
    DocumentLengths,
    choose_records,
    draw_histogram,
    measure_lengths,
)
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.errors import ConfigError

RECORD_TOKENS = 3000
LENGTH = 64

Run = Callable[..., str]


@pytest.fixture(scope="module")
def texts(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Build a dataset of two files, whose longest document has a few records."""
    folder = tmp_path_factory.mktemp("texts")
    lines = small_corpus.read_text(encoding="ascii").splitlines(keepends=True)
    longest = max(lines, key=len)
    files = [folder / "a.jsonl", folder / "b.jsonl"]
    files[0].write_text("".join([*lines[:20], longest, *lines[20:40]]), encoding="ascii")
    files[1].write_text("".join(lines[40:]), encoding="ascii")
    return files


@pytest.fixture(scope="module")
def documents(texts: list[Path], tokenizer_directory: Path) -> list[list[int]]:
    """Encode each document with its end by the tokenizer alone."""
    tokenizer = Tokenizer.load(tokenizer_directory)
    assert tokenizer.eos_token_id is not None
    lines = [line for file in texts for line in file.read_text(encoding="ascii").splitlines()]
    return [[*tokenizer.encode(json.loads(line)["text"]), tokenizer.eos_token_id] for line in lines]


@pytest.fixture(scope="module")
def directory(texts: list[Path], tokenizer_directory: Path) -> Path:
    out = texts[0].with_name("data")
    main(
        [
            *("build", "--input", *map(str, texts), "--tokenizer", str(tokenizer_directory)),
            *("--out", str(out), "--workers", "1"),
            *("--record-tokens", str(RECORD_TOKENS), "--shard-records", "4"),
        ]
    )
    return out


def test_counts_and_lengths_are_those_of_the_texts(
    directory: Path, documents: list[list[int]], run: Run
) -> None:
    (found,) = json.loads(run("inspect", directory, "--json"))["datasets"]
    lengths = [len(document) for document in documents]
    assert max(lengths) > 2 * RECORD_TOKENS
    assert found["num_documents"] == len(documents)
    assert found["num_tokens"] == sum(lengths)
    assert [source["num_documents"] for source in found["sources"]] == [41, len(documents) - 41]
    measured = found["document_lengths"]
    assert measured["documents"] == len(documents)
    assert measured["quantiles"]["shortest"] == min(lengths)
    assert measured["quantiles"]["longest"] == max(lengths)
    assert measured["quantiles"]["median"] == sorted(lengths)[(len(lengths) - 1) // 2]
    for entry in measured["histogram"]:
        inside = [entry["from"] <= length <= entry["to"] for length in lengths]
        assert entry["documents"] == sum(inside)
    assert sum(entry["documents"] for entry in measured["histogram"]) == len(documents)
    shown = run("inspect", directory)
    assert f"longest {max(lengths)}" in shown
    assert "#" * 50 in shown


def test_lengths_of_some_records_are_of_the_documents_that_begin_there(
    directory: Path, documents: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = TokenDataset.open(directory)
    monkeypatch.setattr(document_lengths, "MAX_RECORDS", 3)
    records = choose_records(dataset.manifest.layout.num_records)
    assert len(set(records)) == 3
    lengths = np.array([len(document) for document in documents])
    starts = np.cumsum(lengths) - lengths
    expected = lengths[np.isin(starts // RECORD_TOKENS, records)]
    found = measure_lengths(dataset, records).lengths
    assert sorted(found) == sorted(expected)


def test_records_without_a_beginning_have_no_lengths(directory: Path) -> None:
    dataset = TokenDataset.open(directory)
    by_record = [measure_lengths(dataset, [n]) for n in range(dataset.manifest.layout.num_records)]
    empty = [found for found in by_record if not found.lengths.size]
    assert empty, "the longest document covers no record whole"
    assert empty[0].quantiles == {}
    assert list(draw_histogram(empty[0].histogram)) == []


def test_a_histogram_shows_empty_and_small_bins() -> None:
    lengths = DocumentLengths(lengths=np.array([2] + [3] * 200 + [16]), num_records=1)
    assert lengths.histogram == [(2, 3, 201), (4, 7, 0), (8, 15, 0), (16, 31, 1)]
    bars = [line.count("#") for line in draw_histogram(lengths.histogram)]
    assert bars == [50, 0, 0, 1]


def test_rows_name_their_documents_and_bytes(
    directory: Path, documents: list[list[int]], run: Run
) -> None:
    stream = np.concatenate([np.array(document) for document in documents])
    number = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    dataset = TokenDataset.open(directory)
    rows_per_record = RECORD_TOKENS // LENGTH
    for row in (0, 3, rows_per_record - 1, rows_per_record, dataset.num_rows(LENGTH) - 1):
        record, place = divmod(row, rows_per_record)
        start = record * RECORD_TOKENS + place * LENGTH
        arguments = ("inspect", directory, "--row", row, "--sequence-length", LENGTH)
        # The tokens of the row, its documents and its bytes in the shard.
        (found,) = json.loads(run(*arguments, "--json"))["datasets"]
        assert found["row"]["tokens"] == stream[start : start + LENGTH].tolist()
        parts = found["row"]["documents"]
        covered = [[part["document"]] * (part["stop"] - part["start"]) for part in parts]
        assert sum(covered, []) == number[start : start + LENGTH].tolist()
        shard = (directory / found["row"]["shard"]).read_bytes()
        data = shard[found["row"]["offset"] :][: 2 * LENGTH]
        assert np.array_equal(np.frombuffer(data, "<u2"), stream[start : start + LENGTH])
        # The source of each document, and the same as text.
        for part in parts:
            file, first = ("a", 0) if part["document"] < 41 else ("b", 41)
            expected = f"document {part['document'] - first} of "
            assert part["source"].startswith(expected)
            assert part["source"].endswith(f"{file}.jsonl")
        shown = run(*arguments)
        assert found["row"]["text"] in shown
        assert f"record         {record} (" in shown
    with pytest.raises(ConfigError, match=r"--row 999999: .* has rows 0 to"):
        run("inspect", directory, "--row", 999999)
