"""A tokenizer is trained on the same sample of texts for any format of the input."""

import gzip
import itertools
import json
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from data_tools import tokenizer_training as module
from data_tools.text.interface import TextOptions
from data_tools.tokenizer_training import TokenizerOptions, train_tokenizer
from megatron_eso.errors import DataError
from tests.support.input_files import SEPARATOR, to_jsonl, to_zstd, write_parquet

VOCAB_SIZE = 400


def test_every_format_gives_the_same_tokenizer(
    tmp_path: Path, small_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample is bounded, so that texts are left out, for any units."""
    monkeypatch.setattr(module, "_SAMPLE_BYTES", 50_000)
    texts = [json.loads(line)["text"] for line in small_corpus.read_text().splitlines()]
    contents = {
        "a.jsonl": to_jsonl(texts),
        "b.jsonl.gz": gzip.compress(to_jsonl(texts)),
        "c.txt.zst": to_zstd(SEPARATOR.join(texts).encode()),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    write_parquet(tmp_path / "d.parquet", texts, row_group_size=7)
    models = set()
    for path in sorted(tmp_path.iterdir()):
        out = tmp_path / f"{path.name}.out"
        options = TokenizerOptions(
            inputs=[str(path)],
            vocab_size=VOCAB_SIZE,
            out=out,
            text=TextOptions(document_separator=SEPARATOR),
        )
        train_tokenizer(options)
        training = json.loads((out / module.TRAINING_FILE).read_text())
        assert 30_000 < training["sample_bytes"] <= 50_000
        models.add((out / "tokenizer.model").read_bytes())
    assert len(models) == 1


def test_broken_lines_stop_or_are_counted(
    tmp_path: Path,
    small_corpus: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_SAMPLE_BYTES", 50_000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + small_corpus.read_bytes() + b"{\n[]\n")
    for on_error in ("stop", "skip"):
        options = TokenizerOptions(
            inputs=[str(path)],
            vocab_size=VOCAB_SIZE,
            out=tmp_path / "out",
            text=TextOptions(on_error=on_error),
        )
        if on_error == "stop":
            with pytest.raises(DataError, match=r"a\.jsonl:1: no key 'text'"):
                train_tokenizer(options)
            assert not (tmp_path / "out").exists()
        else:
            train_tokenizer(options)
            assert (
                f"3 broken lines, rows or files left out, first: {path}:1: no key"
                in capsys.readouterr().err
            )


@given(
    segments=st.lists(st.binary(min_size=1, max_size=12), min_size=1, max_size=40),
    room=st.integers(1, 100),
)
def test_the_sample_has_the_lowest_hashes_that_fit(segments: list[bytes], room: int) -> None:
    sample = module._Sample(room)
    for segment in segments:
        sample.add(segment)
    ranked = sorted(range(len(segments)), key=lambda i: (xxhash.xxh3_64_intdigest(segments[i]), i))
    ends = itertools.accumulate(len(segments[index]) for index in ranked)
    kept = [index for index, end in zip(ranked, ends, strict=True) if end <= room] or ranked[:1]
    assert sample.segments() == [segments[index] for index in sorted(kept)]
