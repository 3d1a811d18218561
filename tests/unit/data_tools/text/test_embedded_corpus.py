"""The embedded corpus is about 2 MB of English, equal each time; no module is run for it."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.text.embedded_corpus import collect_documents, write_corpus
from megatron_eso.errors import ConfigError


def test_size_and_kind(corpus: Path) -> None:
    lines = corpus.read_text(encoding="ascii").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert all(set(json.loads(line)) == {"text"} for line in lines[:10])
    assert 1.8e6 < sum(map(len, texts)) < 2.6e6
    assert len(texts) > 500
    assert len(set(texts)) == len(texts)
    words = "".join(texts).split()
    assert words.count("the") > 0.03 * len(words)


def test_no_paragraph_occurs_twice(corpus: Path) -> None:
    paragraphs = [
        paragraph
        for line in corpus.read_text(encoding="ascii").splitlines()
        for paragraph in json.loads(line)["text"].strip("\n").split("\n\n")
    ]
    assert len(set(paragraphs)) == len(paragraphs)


def test_another_process_collects_the_same(corpus: Path) -> None:
    """A part of the library is collected, since the whole takes seconds."""
    library = Path(asyncio.__file__).parent
    code = (
        "import pathlib, sys\n"
        "from data_tools.text.embedded_corpus import collect_documents\n"
        "print(ascii(list(collect_documents(pathlib.Path(sys.argv[1])))))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code, str(library)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
    assert [path.name for path in corpus.parent.glob("*.unfinished")] == []


def test_modules_are_read_and_never_run(tmp_path: Path) -> None:
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text('topics = {"b": "B topic", "a": "A topic"}')
    (tmp_path / "alpha.py").write_text(
        '"""Alpha."""\nimport sys\nsys.corpus_ran = True\n'
        'class C:\n    """Of C."""\n    def f(self):\n        """Of f."""\n'
        'def g():\n    """Of g."""\n'
    )
    (tmp_path / "broken.py").write_text("def (")
    for excluded in ("test", "site-packages"):
        (tmp_path / excluded).mkdir()
        (tmp_path / excluded / "beta.py").write_text('"""Beta."""')
    assert list(collect_documents(tmp_path)) == [
        "A topic\n",
        "B topic\n",
        "Alpha.\n\nOf C.\n\nOf f.\n\nOf g.\n",
    ]
    assert not hasattr(sys, "corpus_ran")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        write_corpus(tmp_path / "there.jsonl")
    with pytest.raises(ConfigError, match="there is no folder"):
        write_corpus(tmp_path / "absent" / "a.jsonl")
