"""The table of text formats, and what every format must do."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_tools.builds.dataset import BuildOptions, build_dataset
from data_tools.text.formats import FORMATS, find_format, list_suffixes
from data_tools.text.interface import (
    Document,
    InputFile,
    Slice,
    TextFormat,
    TextOptions,
    Unit,
    hash_document,
)
from data_tools.text.streams import read_stream
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from tests.support.input_files import to_jsonl, write_parquet

TEXTS = ["first", "second, naïve", "third"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", "jsonl"),
        ("a.b.ndjson", "jsonl"),
        ("a.json.gz", "json"),
        ("a.txt.zst", "txt"),
        ("a.parquet", "parquet"),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("a.csv", None),
        ("jsonl", None),
    ],
)
def test_suffixes_decide(name: str, expected: str | None) -> None:
    found = find_format(Path(name))
    assert (found and found.name) == expected


def test_the_suffixes_are_named_in_messages() -> None:
    assert list_suffixes() == ".jsonl, .ndjson, .json, .txt (each also .gz, .zst) and .parquet"


def test_no_suffix_and_no_name_is_taken_twice() -> None:
    suffixes = [suffix for each in FORMATS.values() for suffix in each.suffixes]
    assert len(set(suffixes)) == len(suffixes)
    assert all(name == each.name for name, each in FORMATS.items())


@pytest.mark.parametrize("form", FORMATS.values(), ids=list(FORMATS))
def test_every_format_gives_the_documents_of_a_file(tmp_path: Path, form: TextFormat) -> None:
    path = tmp_path / f"a{form.suffixes[0]}"
    match form.name:
        case "jsonl":
            path.write_bytes(to_jsonl(TEXTS))
        case "json":
            path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
        case "txt":
            path.write_bytes("|".join(TEXTS).encode())
        case "parquet":
            write_parquet(path, TEXTS)
    size = path.stat().st_size
    file = InputFile(path=path, name=path.name, kind=form.name, compression=None, num_bytes=size)
    options = TextOptions(document_separator="|")
    units = list(form.read(file, Slice(file=0, start=0, stop=size), 5, options, 8))
    assert units[-1].source is not None
    assert units[-1].source.num_bytes == size == sum(unit.raw_bytes for unit in units)
    assert {(unit.slice, unit.kind, unit.path) for unit in units} == {(5, form.name, str(path))}
    assert [unit.source for unit in units[:-1]] == [None] * (len(units) - 1)
    documents = [document for unit in units for document in form.parse(unit, options)]
    assert [dataclasses.asdict(document)["text"].decode() for document in documents] == TEXTS


def read_fasta(
    file: InputFile, part: Slice, index: int, options: TextOptions, unit_bytes: int
) -> Iterator[Unit]:
    return read_stream(file, part, index, separator=b"\n", unit_bytes=unit_bytes)


def parse_fasta(unit: Unit, options: TextOptions) -> Iterator[Document]:
    for line in filter(None, unit.data.split(b"\n")):
        if not line.startswith(b">"):
            yield Document(text=line, hash=hash_document(line))


FASTA = TextFormat(
    name="fasta",
    suffixes=(".fasta",),
    is_compressible=True,
    is_sliceable=True,
    read=read_fasta,
    parse=parse_fasta,
)


def test_a_new_format_is_one_entry(
    tmp_path: Path, tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new format has a sequence per line after a line with its name."""
    monkeypatch.setitem(FORMATS, FASTA.name, FASTA)
    assert ".txt, .fasta (each also .gz, .zst) and .parquet" in list_suffixes()
    sequences = [f"ACGT{number}" * 5 for number in range(40)]
    text = "".join(f">{number}\n{line}\n" for number, line in enumerate(sequences))
    (tmp_path / "a.fasta").write_text(text)
    build_dataset(
        BuildOptions(
            inputs=[str(tmp_path)],
            tokenizer=str(tokenizer_directory),
            out=tmp_path / "out",
            span_bytes=300,
        )
    )
    dataset = TokenDataset.open(tmp_path / "out")
    assert len(dataset.manifest.sources) > 3
    tokens = dataset.rows(np.arange(dataset.num_rows(1)), 1)[:, 0]
    tokenizer = Tokenizer.load(tokenizer_directory)
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    found = [tokenizer.decode(part.tolist()) for part in np.split(tokens, ends + 1)[:-1]]
    assert found == sequences
