"""Exit codes and one-line errors of the commands, and the reports of verify and inspect."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_tools.__main__ import main
from data_tools.tokenizer_training import TokenizerOptions, train_tokenizer
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.errors import ConfigError, DataError
from tests.support.processes import HANG_SECONDS


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_tools", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )


@pytest.fixture
def dataset(small_corpus: Path, tokenizer_directory: Path, tmp_path: Path) -> Path:
    out = tmp_path / "data"
    main(
        [
            *("build", "--input", str(small_corpus), "--tokenizer", str(tokenizer_directory)),
            *("--out", str(out), "--workers", "1", "--validation", "0.2"),
            *("--record-tokens", "20000", "--shard-records", "2"),
        ]
    )
    return out


def test_errors_are_one_line_with_their_exit_code(tmp_path: Path, small_corpus: Path) -> None:
    out = str(tmp_path / "out")
    wrong_path = run_tool(
        "train-tokenizer", "--input", "absent.txt", "--vocab-size", "500", "--out", out
    )
    assert wrong_path.returncode == 2
    assert wrong_path.stderr == "error: --input absent.txt: there is no such file or folder\n"
    no_tokenizer = run_tool(
        "build", "--input", str(small_corpus), "--tokenizer", str(tmp_path), "--out", out
    )
    assert no_tokenizer.returncode == 1
    assert no_tokenizer.stderr.startswith("error: cannot read the tokenizer")
    assert no_tokenizer.stderr.count("\n") == 1
    assert run_tool("verify").returncode == 2
    assert run_tool("build", "--validation", "1.5").returncode == 2


def test_verify_finds_every_kind_of_damage(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["verify", str(dataset)])
    assert capsys.readouterr().out.count("intact") == 2
    train = dataset / "train"
    layout = TokenDataset.open(train).manifest.layout
    shard = train / "shard-00000.tar"
    for path, place, problem in (
        (shard, 3, "headers or padding"),
        (shard, layout.record_offset(1) - 500, "headers or padding"),
        (shard, layout.record_offset(1) + 7, r"00000001\.tokens\.u16: the block at offset"),
        (shard, shard.stat().st_size - 1, "headers or padding"),
        (train / "blocks.xxh3", 3, "sha256 differs"),
        (train / "tokenizer" / "tokenizer.model", 300, "sha256 differs"),
    ):
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=problem):
            main(["verify", str(dataset)])
        path.write_bytes(content)
    main(["verify", str(dataset)])


def test_inspect_shows_counts_and_text(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = TokenDataset.open(dataset / "train")
    main(["inspect", str(dataset)])
    shown = capsys.readouterr().out
    assert train.dataset_id in shown
    assert str(train.num_tokens) in shown
    main(["inspect", str(dataset / "train"), "--row", "2", "--sequence-length", "64"])
    shown = capsys.readouterr().out
    (row,) = train.rows(np.array([2]), 64)
    tokenizer = Tokenizer.load(train.tokenizer_directory)
    assert tokenizer.decode(row.tolist()) in shown.replace("<end of text>", "")
    with pytest.raises(ConfigError, match="--row 999999"):
        main(["inspect", str(dataset), "--row", "999999"])


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_training_a_tokenizer_again_gives_the_same_bytes(
    tmp_path: Path, small_corpus: Path, model_type: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        main(
            [
                *("train-tokenizer", "--input", str(small_corpus), "--vocab-size", "500"),
                *("--out", str(tmp_path / name), "--model-type", model_type),
            ]
        )
    shown = capsys.readouterr().out
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("a", "b")]
    assert files[0] == files[1]
    assert {"tokenizer.model", "tokenizer_training.json"} <= set(files[0])
    for name in files[0]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    tokenizer = Tokenizer.load(tmp_path / "a")
    assert tokenizer.vocab_size == 500
    assert tokenizer.fingerprint().model_sha256 in shown
    texts = shown.split("round trip: ")[1].split(" texts exact")[0]
    exact, _, tried = texts.partition(" of ")
    assert exact == tried


@pytest.mark.parametrize("vocab_size", [100, 10**6])
def test_vocabulary_sizes_that_do_not_fit_are_refused(
    tmp_path: Path, small_corpus: Path, vocab_size: int
) -> None:
    options = TokenizerOptions(
        inputs=[str(small_corpus)], vocab_size=vocab_size, out=tmp_path / "out"
    )
    with pytest.raises(ConfigError, match=f"--vocab-size {vocab_size} does not fit the text: "):
        train_tokenizer(options)
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_smaller_than_its_special_ids_is_refused(
    tmp_path: Path, small_corpus: Path
) -> None:
    options = TokenizerOptions(inputs=[str(small_corpus)], vocab_size=3, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="--vocab-size 3 has no room for the special ids; give"):
        train_tokenizer(options)
