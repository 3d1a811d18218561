"""Input files are found by name, folder and glob, and divided into spans."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.text.inputs import find_inputs, parse_separator
from data_tools.text.interface import InputFile
from data_tools.text.spans import plan_spans
from megatron_eso.errors import ConfigError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    names = (
        "b.jsonl a.txt.zst deep/er/c.parquet deep/d.json.gz deep/e.ndjson "
        ".hidden/f.jsonl g.md h.parquet.gz i.bz2 .j.txt"
    )
    for name in names.split():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 7)
    return tmp_path


def test_folders_and_globs_are_searched_in_order(tree: Path) -> None:
    everything = ["a.txt.zst", "b.jsonl", "deep/d.json.gz", "deep/e.ndjson", "deep/er/c.parquet"]
    cases = {
        "": everything,
        "**": everything,
        "deep": ["d.json.gz", "e.ndjson", "er/c.parquet"],
        "*": everything,
        "*.jsonl": ["b.jsonl"],
        "**/*.parquet": ["deep/er/c.parquet"],
        "d*p/[de].*": ["deep/d.json.gz", "deep/e.ndjson"],
        "deep/*": ["d.json.gz", "e.ndjson", "er/c.parquet"],
    }
    for text, names in cases.items():
        assert [file.name for file in find_inputs([str(tree / text)])] == names, text


def test_suffixes_decide_on_kind_and_compression(tree: Path) -> None:
    names = ["deep/er/c.parquet", "a.txt.zst", "b.jsonl", "deep/d.json.gz"]
    found = find_inputs([*(str(tree / name) for name in names), "-"])
    assert [(file.name, file.kind, file.compression, file.num_bytes) for file in found] == [
        ("c.parquet", "parquet", None, 7),
        ("a.txt.zst", "txt", "zstd", 7),
        ("b.jsonl", "jsonl", None, 7),
        ("d.json.gz", "jsonl", "gzip", 7),
        ("-", "jsonl", None, 0),
    ]


def test_an_existing_file_is_not_read_as_a_glob(tmp_path: Path) -> None:
    for name in ("a[1].jsonl", "a1.jsonl"):
        (tmp_path / name).write_text("{}")
    assert [file.name for file in find_inputs([str(tmp_path / "a[1].jsonl")])] == ["a[1].jsonl"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["none"], "none: there is no such file or folder"),
        (["*.csv"], r"\*\.csv: holds no text; the kinds are \.jsonl"),
        (["g.md"], "g.md: is of an unknown kind; the kinds are .jsonl"),
        (["h.parquet.gz"], "is of an unknown kind"),
        (["b.jsonl", "*.jsonl"], "--input .*b.jsonl: is named twice"),
    ],
)
def test_wrong_paths_are_refused(tree: Path, names: list[str], message: str) -> None:
    paths = [str(tree / name) for name in names]
    with pytest.raises(ConfigError, match=message):
        find_inputs(paths)


def test_an_empty_folder_and_standard_input_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no text"):
        find_inputs([str(tmp_path)])
    with pytest.raises(ConfigError, match="--input -: is named twice"):
        find_inputs(["-", "-"])


def test_separators_may_have_escapes() -> None:
    texts = {r"\n\n": "\n\n", "<é😀>": "<é😀>", r"a\\n": "a\\n", r"\x1e\u2581\t": "\x1e\u2581\t"}
    for text, separator in texts.items():
        assert parse_separator(text) == separator
    for broken in ("", "\\", r"\x1", r"\ud800"):
        with pytest.raises(ConfigError, match="--document-separator"):
            parse_separator(broken)


FILES = st.lists(
    st.builds(
        InputFile,
        path=st.just(Path("x")),
        name=st.just("x"),
        kind=st.sampled_from(["jsonl", "txt", "parquet"]),
        compression=st.sampled_from([None, "gzip"]),
        num_bytes=st.integers(0, 1000),
    ),
    max_size=20,
)


@given(files=FILES, span_bytes=st.integers(1, 300))
def test_spans_hold_every_byte_once_in_order(files: list[InputFile], span_bytes: int) -> None:
    spans = plan_spans(files, span_bytes)
    assert [span.number for span in spans] == list(range(len(spans)))
    slices = [part for span in spans for part in span.slices]
    assert [part.file for part in slices] == sorted(part.file for part in slices)
    for number, file in enumerate(files):
        own = [part for part in slices if part.file == number]
        assert [part.start for part in own] == [0, *(part.stop for part in own[:-1])]
        assert own[-1].stop == file.num_bytes
        if file.kind != "jsonl" or file.compression is not None:
            assert len(own) == 1
    for span in spans:
        size = sum(part.stop - part.start for part in span.slices)
        assert size <= span_bytes or len(span.slices) == 1
    for first, second in zip(spans, spans[1:], strict=False):
        size = sum(part.stop - part.start for part in (*first.slices, second.slices[0]))
        assert size > span_bytes
