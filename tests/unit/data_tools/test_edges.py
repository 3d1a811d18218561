"""Mistakes on the command line of the data tools, and the lines that report them."""

import gzip
import io
import json
import sys
from pathlib import Path

import pytest

from data_tools.__main__ import main
from data_tools.builds.dataset import BuildOptions, build_dataset
from data_tools.tokenizer_training import TokenizerOptions, train_tokenizer
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.errors import ConfigError, DataError


@pytest.fixture
def shards(small_corpus: Path, tokenizer_directory: Path, tmp_path: Path) -> Path:
    out = tmp_path / "shards"
    build_dataset(
        BuildOptions(
            inputs=[str(small_corpus)],
            tokenizer=str(tokenizer_directory),
            out=out,
            validation_share=0.2,
        )
    )
    return out


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line of a refused command line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_wrong_argument_names_no_private_function(capsys: pytest.CaptureFixture[str]) -> None:
    line = refuse(capsys, "build", "--validation", "half")
    hint = "see `python -m data_tools build --help`"
    assert line == f"error: --validation: half is not a number; {hint}"
    line = refuse(capsys, "build", "--record-tokens", "9" * 20)
    assert line.startswith(f"error: --record-tokens: {'9' * 20} is not a whole number from 1 to ")
    line = refuse(capsys, "verify", "nowhere")
    assert line.startswith("error: DIR|URL: nowhere: No such file or directory; see ")


def test_an_output_that_cannot_be_written_is_named(
    small_corpus: Path, tokenizer_directory: Path, tmp_path: Path
) -> None:
    for out in (small_corpus / "out", Path("/proc/out"), tmp_path / ("x" * 250)):
        with pytest.raises(
            ConfigError, match=rf"--out {str(out)[:80]}\S*: cannot be written \(.+\); give"
        ):
            build_dataset(
                BuildOptions(
                    inputs=[str(small_corpus)], tokenizer=str(tokenizer_directory), out=out
                )
            )
        with pytest.raises(
            ConfigError, match=rf"--out {str(out)[:80]}\S*: cannot be written \(.+\); give"
        ):
            train_tokenizer(TokenizerOptions(inputs=[str(small_corpus)], vocab_size=500, out=out))


def test_sizes_of_a_tokenizer_are_explained_by_its_options(
    small_corpus: Path, tmp_path: Path
) -> None:
    for size, remedy in (
        (100, r"are \d+; give that or more"),
        (10**6, r"yields \d+ pieces; give that or l"),
    ):
        options = TokenizerOptions(
            inputs=[str(small_corpus)], vocab_size=size, out=tmp_path / "out"
        )
        with pytest.raises(ConfigError, match=f"--vocab-size {size} .*{remedy}") as error:
            train_tokenizer(options)
        assert "coverage" not in str(error.value)


def test_invalid_json_names_what_was_expected(
    tokenizer_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    path.write_text('{\n"text": "one object on several lines"\n}\n')
    with pytest.raises(
        DataError, match=r"JSONL was expected, one object a line\).*--on-error skip"
    ):
        main(
            [
                *("build", "--input", str(path), "--tokenizer", str(tokenizer_directory)),
                *("--out", str(tmp_path / "out"), "--workers", "1"),
            ]
        )


def test_text_on_standard_input_names_the_option_of_its_format(
    tokenizer_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a b c")))
    arguments = ["build", "--input", "-", "--tokenizer", str(tokenizer_directory)]
    with pytest.raises(DataError, match=r"name the format by --format \(JSONL was expected\)"):
        main([*arguments, "--out", str(tmp_path / "out"), "--workers", "1"])


@pytest.mark.parametrize("form", ["jsonl", "json", "txt"])
def test_standard_input_has_the_format_that_is_named(
    form: str, tokenizer_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["first text", "second text"]
    content = {
        "jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts),
        "json": json.dumps([{"text": text} for text in texts]),
        "txt": "|".join(texts),
    }[form]
    for number, data in enumerate((content.encode(), gzip.compress(content.encode()))):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        out = tmp_path / f"out{number}"
        main(
            [
                *("build", "--input", "-", "--tokenizer", str(tokenizer_directory)),
                *("--out", str(out), "--workers", "1", "--format", form),
                *("--document-separator", "|"),
            ]
        )
        assert TokenDataset.open(out).manifest.num_documents == 2


@pytest.mark.parametrize("command", ["build", "train-tokenizer"])
def test_a_format_is_refused_without_standard_input(
    command: str, small_corpus: Path, tokenizer_directory: Path, tmp_path: Path
) -> None:
    options = {"build": ["--tokenizer", str(tokenizer_directory)]}.get(
        command, ["--vocab-size", "500"]
    )
    with pytest.raises(ConfigError, match="^--format txt: is for standard input, --input -; leave"):
        main(
            [
                *(command, "--input", str(small_corpus), "--format", "txt"),
                *("--out", str(tmp_path / "out"), *options),
            ]
        )
    assert not (tmp_path / "out").exists()


def test_verify_takes_several_folders(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    main(["verify", str(shards / "validation"), str(shards)])
    assert capsys.readouterr().out.count("intact") == 3


def test_one_damage_has_one_remedy(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remedy = "restore the dataset from its source or build it again"
    train = shards / "train"
    run = [f"data.train={train}", "data.sequence_length=64", f"run.directory={shards}/run"]
    shard = train / "shard-00000.tar"
    whole = shard.read_bytes()
    for content in (whole[:-100], whole[:9000] + b"damaged" + whole[9007:]):
        shard.write_bytes(content)
        with pytest.raises(DataError) as verified:
            main(["verify", str(train)])
        assert str(verified.value).endswith(f"; {remedy}")
        assert str(verified.value).count(remedy) == 1
        assert str(verified.value).startswith(f"{train}: 1 problem, first: ")
    shard.write_bytes(whole[:-100])
    with pytest.raises(DataError) as ordered:
        main(["order", "quickstart.toml", *run, "--sample", "3"])
    assert str(ordered.value).endswith(f"; {remedy}")
