"""Files of every format yield the same documents, for any cuts and in little memory."""

import gzip
import hashlib
import io
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.text.inputs import find_inputs
from data_tools.text.interface import TextOptions, Unit
from data_tools.text.spans import plan_spans
from data_tools.text.units import read_units
from megatron_eso.data.tokenizers.tokenizer import split_segments
from megatron_eso.errors import DataError
from tests.support.input_files import (
    SEPARATOR,
    read_documents,
    to_jsonl,
    to_zstd,
    write_formats,
    write_parquet,
)

ROOT = Path(__file__).parents[4]
SMALL = settings(max_examples=60)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    random.seed(5)
    alphabet = 'abcdef "\\/\n\r\t\x00é\u2028\u2581\ufeff😀'
    texts = ["".join(random.choices(alphabet, k=random.randrange(300))) for _ in range(300)]
    return ["", "\n", *texts, "x" * 70_000, "y\n" * 40_000, "last"]


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> list[Path]:
    return write_formats(tmp_path_factory.mktemp("formats"), texts)


@pytest.mark.parametrize("cuts_documents", [True, False])
@pytest.mark.parametrize("unit_bytes", [97, 4096, 2**20])
def test_every_format_gives_the_same_documents(
    formats: list[Path], texts: list[str], unit_bytes: int, *, cuts_documents: bool
) -> None:
    options = TextOptions(document_separator=SEPARATOR, cuts_documents=cuts_documents)
    for path in formats:
        reading = read_documents(path, options=options, span_bytes=10_000, unit_bytes=unit_bytes)
        assert reading.texts == texts, path
        assert sum(unit.raw_bytes for unit in reading.units) == path.stat().st_size
        if "many" not in path.name and path.suffix != ".parquet":
            longest = 350_000 if "txt" not in path.name or not cuts_documents else 100_000
            assert max(len(unit.data) for unit in reading.units) <= unit_bytes + longest


def test_many_files_are_read_in_order_with_their_sources(
    formats: list[Path], texts: list[str]
) -> None:
    options = TextOptions(document_separator=SEPARATOR)
    reading = read_documents(formats[0].parent, options=options)
    assert reading.texts == texts * len(formats)
    sources = [unit.source for unit in reading.units if unit.source is not None]
    assert [source.sha256 for source in sources] == [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in formats
    ]
    assert [source.num_bytes for source in sources] == [path.stat().st_size for path in formats]


def test_a_text_file_without_separator_is_one_document(tmp_path: Path) -> None:
    for name, text in (("a.txt", "a\n\n" * 30_000), ("b.txt", "x" * 50_000), ("c.txt", "\n")):
        (tmp_path / name).write_text(text)
        reading = read_documents(tmp_path / name, unit_bytes=1000)
        assert reading.texts == [text]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress((tmp_path / "a.txt").read_bytes()))
    assert read_documents(tmp_path / "a.txt.gz").texts == ["a\n\n" * 30_000]


# A line of JSONL: length of its text, blank lines before it, whether it ends with \r\n.
LINES = st.lists(st.tuples(st.integers(0, 80), st.integers(0, 2), st.booleans()), max_size=30)


@SMALL
@given(
    lines=LINES,
    ends=st.booleans(),
    unit_bytes=st.integers(4, 200),
    span_bytes=st.integers(1, 500),
    skip=st.floats(0, 1),
)
def test_slices_and_units_of_jsonl_hold_each_line_once(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[tuple[int, int, bool]],
    ends: bool,
    unit_bytes: int,
    span_bytes: int,
    skip: float,
) -> None:
    parts = []
    for number, (length, blanks, carriage) in enumerate(lines):
        text = to_jsonl([f"{number}" + "é" * length])
        parts.append(b"\n" * blanks + (text[:-1] + b"\r\n" if carriage else text))
    content = b"".join(parts) or b"\n"
    content = content if ends else content.removesuffix(b"\n") or b" "
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(content)
    files = find_inputs([str(path)])
    joined = b""
    for span in plan_spans(files, span_bytes):
        units = list(read_units(files, span, TextOptions(), unit_bytes=unit_bytes))
        joined += b"".join(unit.data for unit in units)
        assert [unit.number for unit in units] == list(range(len(units)))
        (part,) = span.slices
        own = content[part.start : part.stop]
        assert units[-1].source is not None
        assert units[-1].source.sha256 == hashlib.sha256(own).hexdigest()
        assert units[-1].source.num_bytes == sum(unit.raw_bytes for unit in units) == len(own)
        longest = max(map(len, content.split(b"\n"))) + 1
        assert all(len(unit.data) <= unit_bytes + longest for unit in units)
        check_resumption(files, span, units, TextOptions(), unit_bytes, skip)
    assert joined == content
    reading = read_documents(path, span_bytes=span_bytes, unit_bytes=unit_bytes)
    assert reading.texts == [f"{n}" + "é" * length for n, (length, _, _) in enumerate(lines)]


def check_resumption(files, span, units, options, unit_bytes, skip) -> None:  # type: ignore[no-untyped-def]
    """Check that the units from any number on equal those of a whole reading."""
    count = round(skip * len(units))
    digest = units[count - 1].digest if count else None
    rest = read_units(
        files, span, options, skip_units=count, skipped_digest=digest, unit_bytes=unit_bytes
    )
    assert list(rest) == units[count:]


SEPARATORS = ["|", "\n\n", "a\n", "||", "a|a", "\n", None]


@SMALL
@given(
    runs=st.lists(
        st.tuples(st.text("a|\n", min_size=1, max_size=6), st.sampled_from([1, 2, 5, 9000])),
        min_size=1,
        max_size=8,
    ),
    separator=st.sampled_from(SEPARATORS),
    cuts_documents=st.booleans(),
    unit_bytes=st.sampled_from([4, 100, 20_000]),
    skip=st.floats(0, 1),
)
def test_units_of_text_are_the_whole_file_and_yield_its_documents(
    tmp_path_factory: pytest.TempPathFactory,
    runs: list[tuple[str, int]],
    separator: str | None,
    cuts_documents: bool,
    unit_bytes: int,
    skip: float,
) -> None:
    content = "".join(text * count for text, count in runs)
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(content, newline="")
    expected = content.split(separator) if separator else [content]
    if separator and not expected[-1]:
        expected.pop()  # nothing after the last separator is a document
    options = TextOptions(document_separator=separator, cuts_documents=cuts_documents)
    reading = read_documents(path, options=options, unit_bytes=unit_bytes)
    assert reading.texts == expected
    assert b"".join(unit.data for unit in reading.units) == content.encode()
    files = find_inputs([str(path)])
    (span,) = plan_spans(files)
    check_resumption(files, span, reading.units, options, unit_bytes, skip)
    if not cuts_documents:
        assert all(unit.ends_document for unit in reading.units)


def test_parts_of_a_document_end_where_its_segments_end(tmp_path: Path) -> None:
    """Then the ids of the parts are those of the whole."""
    random.seed(3)
    text = "".join("w" * random.randrange(2000) + "\n" for _ in range(500))
    (tmp_path / "a.txt").write_text("first|" + text + "|last")
    options = TextOptions(document_separator="|")
    units = read_documents(tmp_path / "a.txt", options=options, unit_bytes=30_000).units
    parts = [unit.data for unit in units if unit.continues or not unit.ends_document]
    parts[-1] = parts[-1].partition(b"|")[0]
    assert len(parts) > 5
    segments = [segment for part in parts for segment in split_segments(part)]
    assert segments == list(split_segments(text.encode()))


def test_an_input_that_has_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(to_jsonl(map(str, range(100))))
    files = find_inputs([str(path)])
    (span,) = plan_spans(files)
    units = list(read_units(files, span, TextOptions(), unit_bytes=100))
    path.write_bytes(path.read_bytes().replace(b'"1"', b'"2"', 1))
    for count in (3, len(units)):
        rest = read_units(
            files,
            span,
            TextOptions(),
            skip_units=count,
            skipped_digest=units[count - 1].digest,
            unit_bytes=100,
        )
        with pytest.raises(DataError, match=r"a\.jsonl.* has changed since"):
            list(rest)
    with path.open("ab") as stream:
        stream.write(b"\n")
    with pytest.raises(DataError, match=r"a\.jsonl had \d+ bytes at the start and has \d+ now"):
        list(read_units(files, span, TextOptions()))
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl: No such file"):
        list(read_units(files, span, TextOptions()))


@pytest.mark.parametrize("compress", [bytes, gzip.compress, to_zstd])
def test_standard_input_is_jsonl_of_any_compression(
    monkeypatch: pytest.MonkeyPatch, texts: list[str], compress: object
) -> None:
    raw = compress(to_jsonl(texts))  # type: ignore[operator]

    def read_pipe() -> list[Unit]:
        reader, writer = os.pipe()

        def write() -> None:
            with os.fdopen(writer, "wb", buffering=0) as stream:
                for start in range(0, len(raw), 1000):
                    stream.write(raw[start : start + 1000])

        thread = threading.Thread(target=write)
        thread.start()
        with os.fdopen(reader, "rb") as stream, io.TextIOWrapper(stream) as text:
            monkeypatch.setattr(sys, "stdin", text)
            reading = read_documents("-", unit_bytes=5000)
        thread.join()
        assert reading.texts == texts
        return reading.units

    units = read_pipe()
    assert units[-1].source is not None
    assert units[-1].source.sha256 == hashlib.sha256(raw).hexdigest()
    assert read_pipe() == units  # for any sizes of reads from the pipe


MEASURE = """
import re, sys
from data_tools.text.inputs import find_inputs
from data_tools.text.interface import TextOptions
from data_tools.text.spans import plan_spans
from data_tools.text.units import parse_unit, read_units
for path in sys.argv[1:]:
    files = find_inputs([path])
    for span in plan_spans(files):
        for unit in read_units(files, span, TextOptions()):
            for document in parse_unit(unit, TextOptions(), []):
                pass
    with open("/proc/self/status") as status:
        print(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1])
"""


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """Each kind is read with 2 MB and with 60 MB of text; the difference is a few units."""
    lines = [random.Random(number).randbytes(511).hex() for number in range(2000)]
    jsonl = to_jsonl(lines)
    paths = []
    for name, count in (("small", 1), ("large", 30)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.jsonl").write_bytes(jsonl * count)
        (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl, 1) * count)
        (folder / "c.jsonl.zst").write_bytes(to_zstd(jsonl) * count)
        (folder / "d.txt").write_bytes("\n".join(lines).encode() * count)
        column = pa.chunked_array([pa.array(lines)] * count)
        write_parquet(folder / "e.parquet", column, use_dictionary=False)
        paths.extend(sorted(map(str, folder.iterdir())))
    # An allocator that gives freed memory back at once, so that the peak is what is in use.
    returned = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_MMAP_THRESHOLD_": "65536"}
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths],
        check=True,
        capture_output=True,
        cwd=ROOT,
        env=os.environ | returned,
    )
    peaks = [1024 * int(peak) for peak in process.stdout.split()]
    print("peaks, MB:", [peak // 10**6 for peak in peaks])
    assert peaks[-1] - peaks[len(peaks) // 2 - 1] < 32e6
