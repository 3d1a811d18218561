"""The embedded corpus and its tokenizer, made once, and a function that runs a command."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.__main__ import main
from data_tools.text.embedded_corpus import write_corpus
from data_tools.tokenizer_training import TokenizerOptions, train_tokenizer


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the embedded corpus."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    write_corpus(path)
    return path


@pytest.fixture(scope="session")
def small_corpus(corpus: Path) -> Path:
    """Write every tenth document of the embedded corpus."""
    path = corpus.with_name("small.jsonl")
    lines = corpus.read_text(encoding="ascii").splitlines(keepends=True)
    path.write_text("".join(lines[::10]), encoding="ascii")
    return path


@pytest.fixture(scope="session")
def tokenizer_directory(small_corpus: Path) -> Path:
    """Train a tokenizer of 600 pieces."""
    out = small_corpus.with_name("tokenizer")
    train_tokenizer(TokenizerOptions(inputs=[str(small_corpus)], vocab_size=600, out=out))
    return out


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs `data_tools` in this process and returns its standard output."""

    def run_main(*arguments: object) -> str:
        capsys.readouterr()
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run_main
