"""Token files of other programs are read as they were written, and damage is reported."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from data_tools.__main__ import main
from data_tools.imports import interface
from data_tools.reports.verification import verify_datasets
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.errors import ConfigError, DataError, UserError
from tests.support.processes import freeze_when

BOS, EOS, MASK, VOCAB_SIZE = 1, 2, 4, 600

Documents = list[list[int]]


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tokenizer of meaningless words."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
    words = special + [f"w{number}" for number in range(len(special), VOCAB_SIZE)]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(special)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set sizes of blocks and index parts that documents do not align with."""
    for module in ("interface", "packed"):
        monkeypatch.setattr(f"data_tools.imports.{module}.BLOCK_TOKENS", 64)
    monkeypatch.setattr("data_tools.imports.megatron._INDEX_ENTRIES", 7)
    assert interface.BLOCK_TOKENS == 64


def make_documents(number: int, *, largest: int = VOCAB_SIZE) -> Documents:
    random = np.random.default_rng(number)
    return [random.integers(5, largest, random.integers(1, 120)).tolist() for _ in range(number)]


def end_all(documents: Documents) -> list[int]:
    return [token for document in documents for token in [*document, EOS]]


def read_tokens(directory: Path) -> list[int]:
    verify_datasets(directory)
    dataset = TokenDataset.open(directory)
    tokens: list[int] = dataset.rows(np.arange(dataset.num_rows(1)), 1)[:, 0].tolist()
    return tokens


def run_import(kind: str, inputs: Sequence[Path], tokenizer: Path, out: Path, *more: str) -> Path:
    arguments = ["import-tokens", "--from", kind, "--input", *map(str, inputs)]
    arguments += ["--tokenizer", str(tokenizer), "--out", str(out), "--record-tokens", "100"]
    main([*arguments, "--shard-records", "5", *more])
    return out


def write_megatron(
    prefix: Path, documents: Documents, dtype: type = np.int32, *, sequences: int = 1
) -> Path:
    """Write with Megatron's own writer, each document in the given number of sequences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        parts = np.array_split(np.array(document, dtype=np.int64), sequences)
        builder.add_document(np.array(document), [len(part) for part in parts])
    builder.finalize(f"{prefix}.idx")
    return prefix


def write_packed(
    prefix: Path, tokens: list[int], chunk_size: int, fill: int, code: int = 8, dtype: str = "<u2"
) -> list[Path]:
    """Write a stream to files of `chunk_size` tokens, with the rest of the last one filled."""
    paths = []
    for number, start in enumerate(range(0, len(tokens), chunk_size)):
        part = tokens[start : start + chunk_size]
        part = part + [fill] * (chunk_size - len(part))
        path = prefix.with_name(f"{prefix.name}_{number:010d}.bin")
        header = b"LITPKDS" + struct.pack("<QBQ", 1, code, chunk_size)
        path.write_bytes(header + np.array(part, dtype=dtype).tobytes())
        paths.append(path)
    return paths


def write_litdata(folder: Path, chunks: Sequence[Documents], kind: str, dtype: str) -> Path:
    folder.mkdir()
    entries = []
    for number, documents in enumerate(chunks):
        items = [np.array(document, dtype=dtype).tobytes() for document in documents]
        places = 4 * (len(items) + 2) + np.cumsum([0, *map(len, items)])
        data = struct.pack("<I", len(items)) + places.astype("<u4").tobytes() + b"".join(items)
        name = f"chunk-0-{number}.bin"
        (folder / name).write_bytes(data)
        entries.append({"chunk_bytes": len(data), "chunk_size": len(items), "filename": name})
    config = {"compression": None, "data_format": [kind], "data_spec": None}
    (folder / "index.json").write_text(json.dumps({"chunks": entries, "config": config}))
    return folder


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint16])
def test_megatron_files_yield_their_documents(
    tmp_path: Path, tokenizer_directory: Path, dtype: type
) -> None:
    documents = make_documents(40, largest=min(VOCAB_SIZE, np.iinfo(dtype).max))
    # Some documents end with the token, some are empty, and so is the first.
    written = [[], *([*doc, EOS] if n % 3 == 0 else doc for n, doc in enumerate(documents)), []]
    prefix = write_megatron(tmp_path / "corpus", written, dtype, sequences=3)
    out = run_import("megatron", [prefix], tokenizer_directory, tmp_path / "out")
    assert read_tokens(out) == end_all(documents)
    manifest = TokenDataset.open(out).manifest
    assert manifest.num_documents == 40
    assert [source.path for source in manifest.sources] == ["corpus.idx", "corpus.bin"]
    assert [source.num_documents for source in manifest.sources] == [0, 40]


def test_several_megatron_files_follow_each_other(
    tmp_path: Path, tokenizer_directory: Path
) -> None:
    (tmp_path / "deep").mkdir()
    documents = make_documents(11)
    write_megatron(tmp_path / "deep" / "b", documents[4:])
    write_megatron(tmp_path / "deep" / "a", documents[:4])
    single = write_megatron(tmp_path / "c", documents)
    out = run_import("megatron", [tmp_path / "deep", single], tokenizer_directory, tmp_path / "out")
    assert read_tokens(out) == end_all([*documents, *documents])
    by_file = run_import(
        "megatron", [single.with_name("c.bin")], tokenizer_directory, tmp_path / "file"
    )
    assert read_tokens(by_file) == end_all(documents)


@pytest.mark.parametrize("chunk_size", [50, 97, 10_000])
@pytest.mark.parametrize("separator", ["bos before", "eos behind", "both"])
def test_packed_files_yield_their_documents(
    tmp_path: Path, tokenizer_directory: Path, chunk_size: int, separator: str
) -> None:
    documents = make_documents(30)
    if separator == "eos behind":
        stream, fill = end_all(documents), EOS
    else:
        documents = [[BOS, *document] for document in documents]
        stream, fill = [token for document in documents for token in document], BOS
    if separator == "both":
        stream = end_all(documents)
    (tmp_path / "in").mkdir()
    write_packed(tmp_path / "in" / "train_0", stream, chunk_size, fill)
    write_packed(tmp_path / "in" / "train_1", stream[: len(documents[0])], chunk_size, fill)
    out = run_import("packed", [tmp_path / "in"], tokenizer_directory, tmp_path / "out")
    assert read_tokens(out) == end_all([*documents, documents[0]])


def test_packed_files_of_other_types_and_without_padding(
    tmp_path: Path, tokenizer_directory: Path
) -> None:
    documents = make_documents(9)
    stream = [token for document in documents for token in [BOS, *document]]
    paths = write_packed(tmp_path / "x", stream, len(stream), BOS, code=4, dtype="<i4")
    out = run_import("packed", paths, tokenizer_directory, tmp_path / "out")
    assert read_tokens(out) == end_all([[BOS, *document] for document in documents])


@pytest.mark.parametrize(("code", "dtype"), [(18, "<i8"), (16, "<i4"), (20, "<u2")])
def test_litdata_chunks_yield_their_items(
    tmp_path: Path, tokenizer_directory: Path, code: int, dtype: str
) -> None:
    documents = make_documents(20)
    written = [[*doc, EOS] if number % 2 else doc for number, doc in enumerate(documents)]
    chunks = [written[:8], [[], *written[8:]]]
    folder = write_litdata(tmp_path / "lit", chunks, f"no_header_tensor:{code}", dtype)
    out = run_import("packed", [folder], tokenizer_directory, tmp_path / "out")
    assert read_tokens(out) == end_all(documents)


def test_the_split_depends_on_the_tokens_alone(tmp_path: Path, tokenizer_directory: Path) -> None:
    documents = make_documents(60)
    prefix = write_megatron(tmp_path / "a", documents)
    ended = write_megatron(tmp_path / "b", [[*doc, EOS] for doc in documents], np.uint16)
    packed = write_packed(tmp_path / "c", end_all(documents), 333, EOS)
    outs = []
    for number, (kind, inputs) in enumerate(
        [("megatron", [prefix]), ("megatron", [ended]), ("packed", packed)]
    ):
        out = tmp_path / f"out{number}"
        run_import(kind, inputs, tokenizer_directory, out, "--validation", "0.3")
        outs.append([read_tokens(out / split) for split in ("train", "validation")])
    assert outs[0] == outs[1] == outs[2]
    both = sorted(split_at_end(outs[0][0]) + split_at_end(outs[0][1]))
    assert both == sorted(documents)
    assert 5 < len(split_at_end(outs[0][1])) < 35
    counts = [
        source.num_documents
        for split in ("train", "validation")
        for source in TokenDataset.open(tmp_path / "out2" / split).manifest.sources
    ]
    assert sum(counts) == 60


def split_at_end(tokens: list[int]) -> Documents:
    documents: Documents = [[]]
    for token in tokens:
        if token == EOS:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents[:-1]


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def put(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("suffix", "offset", "data", "message"),
    [
        (".bin", -1, b"", r"c\.bin: byte \d+: the file has \d+ bytes, its index"),
        (".idx", -1, b"", r"c\.idx: byte 0: the index has"),
        (".idx", 20, b"", r"c\.idx: byte 0: .*header"),
        (".idx", 0, b"TNTIDX", r"c\.idx: byte 0: begins with"),
        (".idx", 9, b"\2", r"version 2"),
        (".idx", 17, b"\7", r"dtype code 7"),
        (".idx", 34 + 4 * 3, b"\x99", r"c\.idx: byte \d+: sequence [34] does not follow"),
        (".idx", 34 + 12 * 20 + 8 * 3, b"\x13", r"bound 4 of documents is below"),
        (".idx", 34 + 12 * 20, b"\1", r"not 0 and 20"),
        (".bin", 4 * 77, struct.pack("<i", MASK), r"c\.bin: byte 308: the id 4 .* mask token"),
        (".bin", 4 * 5, struct.pack("<i", 600), r"c\.bin: byte 20: the id 600 is not in"),
        (".bin", 4 * 5, struct.pack("<i", -1), r"c\.bin: byte 20: the id -1 is not in"),
    ],
)
def test_damaged_megatron_files_are_refused(
    tmp_path: Path, tokenizer_directory: Path, suffix: str, offset: int, data: bytes, message: str
) -> None:
    prefix = write_megatron(tmp_path / "c", make_documents(20))
    path = prefix.with_suffix(suffix)
    if data:
        put(path, offset, data)
    else:
        truncate(path, offset)
    with pytest.raises(DataError, match=message):
        run_import("megatron", [prefix], tokenizer_directory, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".bin", ".idx")]


def test_damaged_packed_files_are_refused(tmp_path: Path, tokenizer_directory: Path) -> None:
    (path,) = write_packed(tmp_path / "p", end_all(make_documents(9)), 2000, EOS)
    sound = path.read_bytes()
    for content, message in (
        (sound[:-1], "byte 4023: the file has 4023 bytes, not 4024"),
        (sound[:10], "is shorter than its header"),
        (sound + b"x", "4025 bytes, not 4024"),
        (b"x" + sound[1:], "begins with b'xITPKDS'"),
        (sound[:7] + b"\2" + sound[8:], "version 2"),
        (sound[:15] + b"\6" + sound[16:], "dtype code 6"),
        (sound[:30] + b"\xff\xff" + sound[32:], "byte 30: the id 65535 is not in"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            run_import("packed", [path], tokenizer_directory, tmp_path / "out")


def test_damaged_litdata_chunks_are_refused(tmp_path: Path, tokenizer_directory: Path) -> None:
    folder = write_litdata(tmp_path / "l", [make_documents(9)], "no_header_tensor:16", "<i4")
    chunk, index = folder / "chunk-0-0.bin", folder / "index.json"
    sound, text = chunk.read_bytes(), index.read_text()
    for content in (sound[:-4], sound[:2], b"\xff" * 4 + sound[4:], sound + b"1234"):
        chunk.write_bytes(content)
        with pytest.raises(DataError, match=r"chunk-0-0\.bin: byte \d+: "):
            run_import("packed", [folder], tokenizer_directory, tmp_path / "out")
    chunk.write_bytes(sound)
    for changed in (
        text[:-5],
        "[]",
        text.replace("no_header_tensor:16", "pickle"),
        text.replace('"compression": null', '"compression": "zstd"'),
        text.replace("chunk-0-0", "../chunk-0-0"),
    ):
        index.write_text(changed)
        with pytest.raises(DataError, match=r"index\.json: byte 0: "):
            run_import("packed", [folder], tokenizer_directory, tmp_path / "out")


def test_wrong_inputs_are_refused(tmp_path: Path, tokenizer_directory: Path) -> None:
    prefix = write_megatron(tmp_path / "c", make_documents(3))
    (tmp_path / "empty").mkdir()
    cases: list[tuple[list[Path], type[UserError], str]] = [
        ([tmp_path / "absent"], ConfigError, r"absent\.idx: No such file"),
        ([tmp_path / "empty"], ConfigError, "holds no"),
        ([prefix, tmp_path / "c.idx"], ConfigError, "named twice"),
    ]
    for inputs, kind, message in cases:
        with pytest.raises(kind, match=message):
            run_import("megatron", inputs, tokenizer_directory, tmp_path / "out")
    with pytest.raises(DataError, match="none of the 3 documents"):
        run_import(
            *("megatron", [prefix], tokenizer_directory, tmp_path / "out"), "--validation", "1e-9"
        )
    assert not (tmp_path / "out").exists()


def test_a_killed_import_leaves_no_dataset_and_can_be_repeated(
    tmp_path: Path, tokenizer_directory: Path
) -> None:
    tokens = np.random.default_rng(0).integers(5, VOCAB_SIZE, 600_000).tolist()
    tokens[999::1000] = [EOS] * 600
    paths = write_packed(tmp_path / "p", tokens, 50_000, EOS)
    command = [sys.executable, "-m", "data_tools", "import-tokens", "--from", "packed", "--input"]
    command += [*map(str, paths), "--tokenizer", str(tokenizer_directory)]
    command += ["--out", str(tmp_path / "out"), "--record-tokens", "1000"]
    building = tmp_path / "out.building"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not freeze_when(process, lambda: list(building.glob("shard-*"))):
        shutil.rmtree(tmp_path / "out")  # it was too quick
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    process.kill()
    process.wait()
    assert process.returncode == -9
    assert not (tmp_path / "out").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert not building.exists()
    assert read_tokens(tmp_path / "out") == tokens
