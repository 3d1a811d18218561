"""Built shards hold the tokens of the text, in equal bytes for any number of workers."""

import fcntl
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from data_tools.__main__ import main
from data_tools.builds.dataset import BuildOptions, Part, build_dataset, merge_parts
from data_tools.reports.verification import verify_datasets
from data_tools.text.interface import TextOptions
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.errors import ConfigError, DataError

SPLITS = ("train", "validation")
TEXTS = ["First text.\n\n  Indented\tand tabbed.", "Zweiter \u00dc-Text \U0001f600", "third", " "]


def build(inputs: list[Path], tokenizer: Path, out: Path, **settings: object) -> None:
    options = BuildOptions(
        inputs=[str(path) for path in inputs], tokenizer=str(tokenizer), out=out, **settings
    )
    build_dataset(options)


def read_tokens(directory: Path) -> list[int]:
    dataset = TokenDataset.open(directory)
    tokens: list[int] = dataset.rows(np.arange(dataset.num_rows(1)), 1)[:, 0].tolist()
    return tokens


def read_tree(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def encode_documents(tokenizer_directory: Path, texts: list[str]) -> list[int]:
    tokenizer = Tokenizer.load(tokenizer_directory)
    assert tokenizer.eos_token_id is not None
    return [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eos_token_id]]


def test_tokens_are_the_documents_in_order(tmp_path: Path, tokenizer_directory: Path) -> None:
    jsonl = write_jsonl(tmp_path / "b.jsonl", [TEXTS[0], "", *TEXTS[1:]], key="body")
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "z.txt").write_text("last file\n", encoding="utf-8")
    (folder / "deep" / "a.txt").write_text("first\r\nfile", encoding="utf-8", newline="")
    (folder / "ignored.md").write_text("not read")
    out = tmp_path / "out"
    build(
        [jsonl, folder],
        tokenizer_directory,
        out,
        text=TextOptions(text_key="body"),
        record_tokens=30,
    )
    expected = [*TEXTS, "first\r\nfile", "last file\n"]
    assert read_tokens(out) == encode_documents(tokenizer_directory, expected)
    manifest = TokenDataset.open(out).manifest
    assert [source.path for source in manifest.sources] == ["b.jsonl", "deep/a.txt", "z.txt"]
    assert [source.num_documents for source in manifest.sources] == [4, 1, 1]
    assert manifest.num_documents == 6
    assert manifest.num_text_bytes == sum(len(text.encode()) for text in expected)
    assert manifest.tokenizer == Tokenizer.load(tokenizer_directory).fingerprint()
    assert Tokenizer.load(out / "tokenizer").fingerprint() == manifest.tokenizer
    verify_datasets(out)


def test_workers_and_parts_do_not_change_a_byte(
    tmp_path: Path, corpus: Path, tokenizer_directory: Path
) -> None:
    """The input is large enough for more units than workers, and more spans than parts."""
    long_text = tmp_path / "long.txt"
    with long_text.open("w", encoding="utf-8") as file:
        for line in corpus.read_text(encoding="ascii").splitlines()[:400]:
            file.write(json.loads(line)["text"])
    inputs, tokenizer = [corpus, long_text], tokenizer_directory
    settings = {
        "validation_share": 0.1,
        "record_tokens": 2**16,
        "shard_records": 4,
        "span_bytes": 2**19,
    }
    for workers in (1, 2, 3):
        out = tmp_path / f"workers_{workers}"
        build(inputs, tokenizer, out, num_workers=workers, **settings)
    expected = read_tree(tmp_path / "workers_1")
    assert read_tree(tmp_path / "workers_2") == expected
    assert read_tree(tmp_path / "workers_3") == expected

    parts = tmp_path / "parts"
    build(inputs, tokenizer, parts, part=Part(number=1, count=2), **settings)
    with pytest.raises(DataError, match=r"lacks 3 of 6 spans; run again --part 0/2"):
        merge_parts(parts)
    build(inputs, tokenizer, parts, part=Part(number=0, count=2), **settings)
    assert not parts.exists()
    merge_parts(parts, num_workers=2)
    assert read_tree(parts) == expected
    assert not (tmp_path / "parts.building").exists()
    with pytest.raises(ConfigError, match="exists already"):
        merge_parts(parts)
    with pytest.raises(ConfigError, match=r"no .*absent\.building to merge"):
        merge_parts(tmp_path / "absent")

    train = TokenDataset.open(tmp_path / "workers_1" / "train")
    assert len(train.manifest.shards) > 1
    # The large file was cut into slices, each named by its bytes.
    pieces = [source for source in train.manifest.sources if source.path == corpus.name]
    assert [piece.offset for piece in pieces] == list(range(0, corpus.stat().st_size, 2**19))
    content = corpus.read_bytes()
    for piece in pieces:
        data = content[piece.offset : piece.offset + piece.bytes]
        assert hashlib.sha256(data).hexdigest() == piece.sha256
    # The long text was cut into units, and its tokens are those of the whole text.
    datasets = [TokenDataset.open(tmp_path / "workers_1" / name) for name in SPLITS]
    (dataset,) = (each for each in datasets if each.manifest.sources[-1].num_documents)
    whole = encode_documents(tokenizer_directory, [long_text.read_text(encoding="utf-8")])
    assert read_tokens(dataset.directory)[-len(whole) :] == whole


def test_splits_hold_every_document_once_by_its_text(
    tmp_path: Path, corpus: Path, tokenizer_directory: Path
) -> None:
    texts = [json.loads(line)["text"][:200] for line in corpus.read_text().splitlines()]
    texts = list(dict.fromkeys(texts))
    tokenizer = Tokenizer.load(tokenizer_directory)

    def read_documents(directory: Path) -> list[str]:
        tokens = np.array(read_tokens(directory))
        ends = np.flatnonzero(tokens == tokenizer.eos_token_id) + 1
        return [tokenizer.decode(part.tolist()) for part in np.split(tokens, ends)[:-1]]

    jsonl = write_jsonl(tmp_path / "a.jsonl", texts)
    build([jsonl], tokenizer_directory, tmp_path / "a", validation_share=0.2)
    train, validation = (read_documents(tmp_path / "a" / name) for name in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts)
    # Binomial: five standard deviations.
    assert abs(len(validation) - 0.2 * len(texts)) < 5 * np.sqrt(0.16 * len(texts))
    # In another order and in other files, each document goes to the same split.
    folder = tmp_path / "files"
    folder.mkdir()
    for number, text in enumerate(reversed(texts)):
        (folder / f"{number:05d}.txt").write_text(text, encoding="utf-8", newline="")
    build([folder], tokenizer_directory, tmp_path / "b", validation_share=0.2)
    assert sorted(read_documents(tmp_path / "b" / "validation")) == sorted(validation)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', "bad.jsonl:2: invalid JSON"),
        (b'{"text": "a"}\n\n{"body": "b"}\n', "bad.jsonl:3: no key 'text'"),
        (b'{"text": 1}\n', "bad.jsonl:1: 'text' is not a string"),
        (b"[1]\n", "bad.jsonl:1: is not a JSON object"),
        (b'{"text": "\xff"}\n', "bad.jsonl:1: invalid UTF-8"),
        (b'{"text": "\\ud800"}\n', "bad.jsonl:1: the text holds half a surrogate pair"),
        (b"[" * 10**6, "bad.jsonl:1: invalid JSON"),
        (b'{"text": ""}\n', "no document with text"),
        (b"", "bad.jsonl: is empty"),
    ],
)
def test_broken_lines_are_named(
    tmp_path: Path, tokenizer_directory: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=problem):
        build([path], tokenizer_directory, tmp_path / "out", deduplicate=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bad.jsonl"]


def test_broken_text_files_are_named_by_line(tmp_path: Path, tokenizer_directory: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b"line\n" * 500_000 + b"\xff\n")
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"bad\.txt:500001: invalid UTF-8"):
            build([path], tokenizer_directory, tmp_path / "out", num_workers=workers)


def test_wrong_paths_are_refused(tmp_path: Path, tokenizer_directory: Path) -> None:
    jsonl = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    unknown = tmp_path / "a.csv"
    unknown.write_text("a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    for path, problem in (
        (tmp_path / "absent.jsonl", "no such file or folder"),
        (unknown, "is of an unknown kind"),
        (tmp_path / "empty", "holds no text"),
    ):
        with pytest.raises(ConfigError, match=problem):
            build([path], tokenizer_directory, tmp_path / "out")
    with pytest.raises(ConfigError, match="exists already"):
        build([jsonl], tokenizer_directory, tmp_path / "taken")
    with pytest.raises(DataError, match="none of the 4 documents went to the validation split"):
        build([jsonl], tokenizer_directory, tmp_path / "out", validation_share=1e-9)
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        build([jsonl], tmp_path / "absent", tmp_path / "out")
    assert (tmp_path / "taken" / "mine").read_text() == "mine"


def test_two_builds_of_one_output_are_refused(tmp_path: Path, tokenizer_directory: Path) -> None:
    jsonl = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    building = tmp_path / "out.building"
    building.mkdir()
    (building / "shard-00000.tar").write_text("left behind")
    with (building / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is writing"):
            build([jsonl], tokenizer_directory, tmp_path / "out")
    build([jsonl], tokenizer_directory, tmp_path / "out")
    verify_datasets(tmp_path / "out")
    assert not building.exists()


def test_the_command_line_builds_in_parts(
    tmp_path: Path, small_corpus: Path, tokenizer_directory: Path
) -> None:
    out = tmp_path / "out"
    command = [
        *("build", "--input", str(small_corpus), "--tokenizer", str(tokenizer_directory)),
        *("--workers", "1", "--validation", "0.3", "--deduplicate", "--shuffle", "5"),
    ]
    main([*command, "--out", str(tmp_path / "straight")])
    for part in ("0/2", "1/2"):
        main([*command, "--out", str(out), "--part", part])
    main(["merge", str(out), "--workers", "1"])
    assert read_tree(out) == read_tree(tmp_path / "straight")
    for wrong in (["--part", "2/2"], ["--part", "1"], ["--shuffle", "-1"], ["--validation", "1"]):
        with pytest.raises(SystemExit) as exit_info:
            main([*command, "--out", str(out), *wrong])
        assert exit_info.value.code == 2
