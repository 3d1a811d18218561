"""`.json` files are read as arrays of objects, or else as lines."""

import gzip
import json
from pathlib import Path

import pytest

from data_tools.builds.dataset import BuildOptions, build_dataset
from data_tools.text.interface import TextOptions
from megatron_eso.errors import DataError
from tests.support.input_files import read_documents, to_jsonl

TEXTS = ["first", 'second, "naïve" ] }, { [', "third\nline", "", "x" * 3000]
SKIP = TextOptions(on_error="skip")


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("unit_bytes", [1, 100, 2**20])
def test_the_objects_of_an_array_are_documents(
    tmp_path: Path, indent: int | None, unit_bytes: int
) -> None:
    path = tmp_path / "a.json"
    array = [{"id": [number, {}], "text": text} for number, text in enumerate(TEXTS)]
    path.write_text("\ufeff \n" + json.dumps(array, indent=indent, ensure_ascii=False) + "\n")
    reading = read_documents(path, unit_bytes=unit_bytes)
    assert reading.texts == TEXTS
    assert sum(unit.raw_bytes for unit in reading.units) == path.stat().st_size
    zipped = tmp_path / "b.json.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert read_documents(zipped, unit_bytes=unit_bytes).texts == TEXTS


def test_an_array_and_equal_lines_have_equal_tokens(
    tmp_path: Path, tokenizer_directory: Path
) -> None:
    texts = [f"document {number} of a larger file, " * 40 for number in range(2000)]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts], indent=2))
    (tmp_path / "a.jsonl").write_bytes(to_jsonl(texts))
    shards = []
    for name in ("a.json", "a.jsonl"):
        out = tmp_path / f"out_{name}"
        build_dataset(
            BuildOptions(inputs=[str(tmp_path / name)], tokenizer=str(tokenizer_directory), out=out)
        )
        shards.append((out / "shard-00000.tar").read_bytes())
    assert shards[0] == shards[1]


def test_other_json_files_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(to_jsonl(TEXTS))
    reading = read_documents(path)
    assert reading.texts == TEXTS
    assert {unit.kind for unit in reading.units} == {"jsonl"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, 5]', "row 2: is not a JSON object"),
        ('[{"text": "a"}, {"body": "b"}]', "row 2: no key 'text'"),
        ('[{"text": "a"}, {"text": "b"', "row 2: invalid JSON"),
        ('[{"text": "a"} {"text": "b"}]', "row 2: no comma"),
        ('[{"text": "a"}', "row 2: the array has no end"),
        ('[{"text": "a"}] [', "row 2: more text after the array"),
        (b'[{"text": "a"}, {"text": "\xff"}]', "invalid UTF-8"),
    ],
)
def test_a_broken_array_is_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as error:
        read_documents(path)
    assert str(error.value).startswith(f"{path}: row ")
    reading = read_documents(path, options=SKIP)
    assert len(reading.problems) == 1


def test_a_truncated_archive_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps([{"text": "a"}] * 9).encode())[:-12])
    with pytest.raises(DataError, match="truncated"):
        read_documents(path)
