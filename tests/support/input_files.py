"""Texts written in every format that `data_tools` reads, and read back by it."""

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_tools.text.inputs import find_inputs
from data_tools.text.interface import TextOptions, Unit, hash_document
from data_tools.text.problems import Problem
from data_tools.text.spans import SPAN_BYTES, plan_spans
from data_tools.text.units import UNIT_BYTES, parse_unit, read_units

SEPARATOR = "<|end|>\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What came out of files."""

    texts: list[str]
    problems: list[Problem]
    units: list[Unit]


def read_documents(
    *inputs: Path | str,
    options: TextOptions | None = None,
    span_bytes: int = SPAN_BYTES,
    unit_bytes: int = UNIT_BYTES,
) -> Reading:
    """Read inputs as `build` does, in one process; documents in parts are put together."""
    options = options or TextOptions()
    files = find_inputs([str(path) for path in inputs])
    reading = Reading(texts=[], problems=[], units=[])
    begun = b""
    for span in plan_spans(files, span_bytes):
        for unit in read_units(files, span, options, unit_bytes=unit_bytes):
            reading.units.append(unit)
            for document in parse_unit(unit, options, reading.problems):
                begun += document.text
                if document.ends:
                    if not reading.problems:
                        assert document.hash == hash_document(begun)
                    reading.texts.append(begun.decode("utf-8"))
                    begun = b""
    assert not begun
    return reading


def to_jsonl(texts: Sequence[str], key: str = "text") -> bytes:
    """Format the texts as JSONL."""
    return b"".join(json.dumps({"id": 0, key: text}).encode() + b"\n" for text in texts)


def to_zstd(data: bytes) -> bytes:
    """One frame, with a checksum."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def write_parquet(path: Path, texts: pa.Array | Sequence[str | None], **options: object) -> Path:
    """Write the texts as a column `text`, next to another column."""
    pq.write_table(pa.table({"other": range(len(texts)), "text": texts}), path, **options)
    return path


def write_formats(folder: Path, texts: Sequence[str]) -> list[Path]:
    """Write the texts in every format; none may hold SEPARATOR or be empty at the end."""
    # Text formats, plain and compressed.
    jsonl, plain = to_jsonl(texts), SEPARATOR.join(texts).encode()
    half = len(jsonl) // 2
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    contents = {
        "plain.jsonl": jsonl,
        "mark.ndjson": b"\xef\xbb\xbf" + jsonl,
        "carriage.json": jsonl.replace(b"\n", b"\r\n\r\n"),
        "unended.jsonl": jsonl[:-1],
        "one.jsonl.gz": gzip.compress(jsonl),
        "members.json.gz": gzip.compress(jsonl[:half]) + gzip.compress(jsonl[half:]) + bytes(99),
        "many.jsonl.gz": b"".join(map(gzip.compress, jsonl.splitlines(keepends=True))),
        "one.jsonl.zst": to_zstd(jsonl),
        "frames.ndjson.zst": to_zstd(jsonl[:half]) + skippable + to_zstd(jsonl[half:]),
        "plain.txt": plain,
        "mark.txt": b"\xef\xbb\xbf" + plain + SEPARATOR.encode(),
        "one.txt.gz": gzip.compress(plain),
        "one.txt.zst": to_zstd(plain),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    # Parquet, with each type of column.
    columns: dict[str, Callable[[], pa.Array]] = {
        "string": lambda: pa.array(texts),
        "large": lambda: pa.array(texts, pa.large_string()),
        "binary": lambda: pa.array([text.encode() for text in texts]),
        "dictionary": lambda: pa.array(texts).dictionary_encode(),
    }
    for name, make in columns.items():
        write_parquet(folder / f"{name}.parquet", make(), row_group_size=len(texts) // 3)
    return sorted(folder.iterdir())
