"""Every kind of broken input is found and named with file and line; the rest is read."""

import gzip
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from data_tools.text.interface import TextOptions
from megatron_eso.errors import DataError
from tests.support.input_files import read_documents, to_jsonl, to_zstd, write_parquet

STEP = 97
TEXTS = [f"document {number} " + "é" * (number % 40) for number in range(100)]
SKIP = TextOptions(on_error="skip")

BAD_LINES = [
    (b'{"text": "b"', "invalid JSON (Expecting ',' delimiter, column 13); correct the line"),
    (b'{"text": "a"} {"text": "b"}', "invalid JSON (Extra data, column 15); correct the line"),
    (b"[" * 10**6, "invalid JSON (maximum recursion depth"),
    (b'{"text": ' + b"1" * 5000 + b"}", "invalid JSON (Exceeds the limit"),
    (b'{"body": "b"}', "no key 'text'; name the key of the text by --text-key"),
    (b'{"text": null}', "'text' is not a string; name the key of the text by --text-key"),
    (b'{"text": {"text": "a"}}', "'text' is not a string"),
    (b'["text"]', "is not a JSON object; each line must be one"),
    (b'"text"', "is not a JSON object"),
    (b'{"text": "\xff"}', "invalid UTF-8; convert the file"),
    (b'{"text": "a", "other": "\xed\xa0\x80"}', "invalid UTF-8"),
    (b'{"text": "\\ud800"}', "the text holds half a surrogate pair; correct the line"),
    (b"\xef\xbb\xbf{}", "invalid JSON"),
]


def expect(path: Path, texts: list[str], places: list[str], **reading: object) -> None:
    """Check that reading stops at the first of the places, or names all and yields the texts."""
    options = reading.pop("options", TextOptions())
    stopping = TextOptions(document_separator=options.document_separator)
    with pytest.raises(DataError) as error:
        read_documents(path, options=stopping, **reading)
    assert str(error.value).startswith(f"{path}{places[0]}")
    skipping = TextOptions(document_separator=options.document_separator, on_error="skip")
    found = read_documents(path, options=skipping, **reading)
    assert found.texts == texts
    described = [problem.describe() for problem in found.problems]
    for text, place in zip(described, places, strict=True):
        assert text.startswith(f"{path}{place}")


@pytest.mark.parametrize(("line", "what"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_broken_lines_are_named(tmp_path: Path, line: bytes, what: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(to_jsonl(["a"]) + b"\n \n" + line + b"\n" + to_jsonl(["b"]))
    expect(path, ["a", "b"], [f":4: {what}"])


@pytest.mark.parametrize("span_bytes", [50, 2000, 2**30])
@pytest.mark.parametrize("unit_bytes", [64, 2**20])
def test_lines_are_counted_across_slices_and_units(
    tmp_path: Path, span_bytes: int, unit_bytes: int
) -> None:
    rng = random.Random(1)
    lines = to_jsonl(TEXTS).splitlines()
    bad = sorted(rng.sample(range(len(lines)), 20))
    for index in bad:
        lines[index] = rng.choice(BAD_LINES)[0][:300]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    good = [text for index, text in enumerate(TEXTS) if index not in bad]
    for path in tmp_path.iterdir():
        places = [f":{index + 1}: " for index in bad]
        expect(path, good, places, span_bytes=span_bytes, unit_bytes=unit_bytes)


def test_text_in_another_encoding_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"line\n" * 9 + b"caf\xe9\n" + b"line\n")
    expect(path, [], [":10: invalid UTF-8"])
    path.write_bytes(b"a|\nb\xff\n|c\n\n|\xc3|d")
    separated = TextOptions(document_separator="|")
    expect(
        path, ["a", "c\n\n", "d"], [":2: invalid", ":5: invalid"], options=separated, unit_bytes=4
    )


def test_the_broken_part_of_a_document_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    lines = [b"x" * 999 + b"\n"] * 100
    for bad in (0, 50, 99):
        path.write_bytes(b"".join([*lines[:bad], b"\xff\n", *lines[bad:]]))
        with pytest.raises(DataError, match=rf"a\.txt:{bad + 1}: invalid UTF-8"):
            read_documents(path, unit_bytes=20_000)
        found = read_documents(path, options=SKIP, unit_bytes=20_000)
        (text,) = found.texts
        assert 0 < len(text) < 100_000
        assert set(text) == {"x", "\n"}
        assert [problem.line for problem in found.problems] == [bad + 1]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.txt", "a.parquet", "a.jsonl.gz", "a.txt.zst", "mark.txt", "none.txt.gz"]
)
def test_files_without_text_are_named(tmp_path: Path, name: str) -> None:
    contents = {"mark.txt": b"\xef\xbb\xbf", "none.txt.gz": gzip.compress(b"")}
    path = tmp_path / name
    path.write_bytes(contents.get(name, b""))
    expect(path, [], [": damaged Parquet" if name == "a.parquet" else ": is empty; leave it out"])


@pytest.mark.parametrize("compress", [gzip.compress, to_zstd])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_truncation_is_always_found(
    tmp_path: Path, compress: Callable[[bytes], bytes], kind: str
) -> None:
    raw = to_jsonl(TEXTS) if kind == "jsonl" else "|".join(TEXTS).encode()
    data = compress(raw)
    path = tmp_path / f"a.{kind}.{'gz' if compress is gzip.compress else 'zst'}"
    places = [*range(1, len(data), STEP), *range(len(data) - 9, len(data))]
    for stop in places:
        path.write_bytes(data[:stop])
        with pytest.raises(DataError, match=r"a\..*: (truncated|damaged) "):
            read_documents(path, options=TextOptions(document_separator="|"), unit_bytes=500)
        options = TextOptions(document_separator="|", on_error="skip")
        found = read_documents(path, options=options, unit_bytes=500)
        assert found.texts == TEXTS[: len(found.texts)]
        assert len(found.problems) == 1
        assert found.problems[0].line == len(found.texts) + 1 or kind == "txt"
        source = found.units[-1].source
        assert source is not None
        assert source.num_bytes == stop


@pytest.mark.parametrize("compress", [gzip.compress, to_zstd])
def test_flipped_bits_are_found(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    data = compress(to_jsonl(TEXTS))
    path = tmp_path / f"a.jsonl.{'gz' if compress is gzip.compress else 'zst'}"
    rng = random.Random(2)
    messages = []
    for _ in range(200):
        place = rng.randrange(len(data))
        flipped = data[place] ^ 1 << rng.randrange(8)
        path.write_bytes(data[:place] + bytes([flipped]) + data[place + 1 :])
        try:
            assert (
                read_documents(path).texts == TEXTS
            )  # such as a bit of the time in the header of gzip
        except DataError as error:
            messages.append(str(error))
    assert all(str(path) in message for message in messages)
    assert len(messages) > 180


def test_other_content_than_the_suffix_says_is_named(tmp_path: Path) -> None:
    plain = to_jsonl(TEXTS)
    contents = {
        "a.jsonl.gz": plain,
        "b.jsonl.zst": plain,
        "c.jsonl.gz": bytes(1000),
        "d.jsonl": gzip.compress(plain),
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{name}:1: "):
            read_documents(path)
    for compress, name in ((gzip.compress, "e.jsonl.gz"), (to_zstd, "f.jsonl.zst")):
        path = tmp_path / name
        path.write_bytes(compress(plain) + b"garbage")
        expect(path, TEXTS, [":101: "])


def test_parquet_rows_and_columns_are_named(tmp_path: Path) -> None:
    texts = ["a", None, "b", "c", None]
    path = write_parquet(tmp_path / "null.parquet", texts, row_group_size=2)
    null = ": row {}: 'text' is null; correct the row"
    expect(path, ["a", "b", "c"], [null.format(2), null.format(5)])
    rows = pa.array([b"good", b"\xff", b"half \xc3", b"\xa9", b""])
    text = pa.Array.from_buffers(pa.string(), len(rows), rows.buffers())
    for column in (rows, text):
        path = write_parquet(tmp_path / "encoding.parquet", column, row_group_size=3)
        invalid = [f": row {row}: invalid UTF-8; convert the text" for row in (2, 3, 4)]
        expect(path, ["good", ""], invalid)
    path = write_parquet(tmp_path / "number.parquet", pa.array([1, 2]))
    expect(path, [], [": column 'text' is int64, no text; name another by --text-key"])
    path = write_parquet(tmp_path / "none.parquet", pa.array([], pa.string()))
    expect(path, [], [": is empty; leave it out"])
    wrong = TextOptions(text_key="body")
    with pytest.raises(DataError, match="no column 'body'; name one of other, text by --text-key"):
        read_documents(path.with_name("null.parquet"), options=wrong)


def test_damaged_parquet_is_always_found(tmp_path: Path) -> None:
    whole = write_parquet(
        tmp_path / "whole",
        TEXTS,
        row_group_size=20,
        write_page_checksum=True,
        use_dictionary=False,
        compression="none",
    ).read_bytes()
    path = tmp_path / "a.parquet"
    for stop in range(0, len(whole), STEP):
        path.write_bytes(whole[:stop])
        expect(path, [], [": damaged Parquet ("])
    # A page of text in the third row group.
    place = whole.index(TEXTS[45].encode())
    path.write_bytes(whole[:place] + b"X" + whole[place + 1 :])
    expect(path, TEXTS[:40] + TEXTS[60:], [": row 41: rows 41 to 60 cannot be read: damaged"])


def test_problems_come_in_the_order_of_the_input(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + to_jsonl(["a"]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(to_jsonl(["b"]))[:-1])
    (tmp_path / "c.txt").write_bytes(b"")
    write_parquet(tmp_path / "d.parquet", ["d", None])
    found = read_documents(tmp_path, options=SKIP)
    assert found.texts == ["a", "b", "d"]
    named = [(Path(problem.path).name, problem.line) for problem in found.problems]
    assert named == [("a.jsonl", 1), ("b.jsonl.gz", 2), ("c.txt", 0), ("d.parquet", 2)]
