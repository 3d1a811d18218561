"""Damaged dataset files: no damaged token is returned, and `verify` reports the damage."""

import itertools
import os
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from data_tools.__main__ import main
from data_tools.reports.verification import verify_dataset
from data_tools.text.embedded_corpus import collect_documents
from megatron_eso.data.shards.format import BLOCK_BYTES, ShardLayout
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.errors import DataError

# Two blocks to a record, two records to a shard.
RECORD_TOKENS = 40_000
SHARD_RECORDS = 2
NUM_TOKENS_AT_LEAST = 2 * RECORD_TOKENS
LENGTH = 1000
CUT_STEP = 97
NUM_FLIPS = 200

OPENING_REFUSES = ("manifest.json", "blocks.xxh3", "documents.u64")

Tokens = npt.NDArray[np.int64]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tokenizer_directory: Path) -> Path:
    """Write a dataset with its real tokenizer, which no test changes."""
    folder = tmp_path_factory.mktemp("sound")
    texts = itertools.islice(collect_documents(Path(sysconfig.get_path("stdlib"))), 70)
    text = folder / "text.txt"
    text.write_text("\n".join(texts), encoding="utf-8")
    main(
        [
            *("build", "--input", str(text), "--tokenizer", str(tokenizer_directory)),
            *("--out", str(folder / "data"), "--workers", "1"),
            *("--record-tokens", str(RECORD_TOKENS), "--shard-records", str(SHARD_RECORDS)),
        ]
    )
    return folder / "data"


@dataclass(frozen=True)
class Subject:
    """A dataset to damage, and its tokens before."""

    directory: Path
    opened: TokenDataset
    """Opened before any damage."""
    rows: Tokens

    @property
    def layout(self) -> ShardLayout:
        return self.opened.manifest.layout

    def read_all(self, dataset: TokenDataset) -> Tokens:
        return dataset.rows(np.arange(len(self.rows)), LENGTH)

    def token_places(self, shard: int) -> Iterator[range]:
        """Return the offsets of each record's tokens in a shard's file."""
        first = shard * SHARD_RECORDS
        for record in range(first, first + self.layout.shard_num_records(shard)):
            offset = self.layout.record_offset(record)
            yield range(offset, offset + self.layout.record_bytes(record))


@pytest.fixture
def subject(tmp_path: Path, sound: Path) -> Subject:
    directory = tmp_path / "data"
    shutil.copytree(sound, directory)
    opened = TokenDataset.open(directory, retry_seconds=())
    assert opened.num_tokens > NUM_TOKENS_AT_LEAST
    assert opened.manifest.layout.num_shards >= 2
    assert not verify_dataset(directory).problems
    rows = opened.rows(np.arange(opened.num_rows(LENGTH)), LENGTH)
    return Subject(directory, opened, rows)


def test_every_cut_of_every_shard_is_detected(subject: Subject) -> None:
    """Open, read after a file became shorter, and verify; each of them detects the cut."""
    num_cuts = 0
    for shard, file in enumerate(subject.opened.manifest.shards):
        path = subject.directory / file.name
        content = path.read_bytes()
        end_of_tokens = max(places.stop for places in subject.token_places(shard))
        for number, cut in enumerate(range(len(content) - 1, -1, -CUT_STEP)):
            num_cuts += 1
            os.truncate(path, cut)
            with pytest.raises(DataError, match=rf"{file.name} has {cut} bytes"):
                TokenDataset.open(subject.directory)
            if number % 20 == 0:
                (problem,) = verify_dataset(subject.directory).problems
                assert f"{file.name} has {cut} bytes" in problem
                if cut < end_of_tokens:
                    with pytest.raises(DataError, match=rf"{file.name}.* cut off"):
                        subject.read_all(subject.opened)
                else:
                    assert np.array_equal(subject.read_all(subject.opened), subject.rows)
        path.write_bytes(content)
    print(f"{num_cuts} cuts")
    assert np.array_equal(subject.read_all(TokenDataset.open(subject.directory)), subject.rows)


def test_missing_files_are_detected(subject: Subject) -> None:
    for path in [subject.directory / "shard-00000.tar", *list_other_files(subject.directory)]:
        content = path.read_bytes()
        path.unlink()
        (problem,) = verify_dataset(subject.directory).problems
        assert path.name in problem
        if path.name in OPENING_REFUSES or path.suffix == ".tar":
            with pytest.raises(DataError, match=path.name):
                TokenDataset.open(subject.directory)
        path.write_bytes(content)


def test_every_cut_of_the_other_files_is_detected(subject: Subject) -> None:
    for path in list_other_files(subject.directory):
        content = path.read_bytes()
        for cut in range(len(content) - 1, -1, -CUT_STEP):
            path.write_bytes(content[:cut])
            if path.name in OPENING_REFUSES:
                with pytest.raises(DataError):
                    TokenDataset.open(subject.directory)
            if cut % 20 == 0 or path.name == "manifest.json":
                assert verify_dataset(subject.directory).problems
        path.write_bytes(content)


def test_no_flipped_bit_is_delivered(subject: Subject) -> None:
    """Flip bits of every file: `verify` finds each, and no reader returns a damaged token."""
    random = np.random.default_rng(1)
    shards = [subject.directory / shard.name for shard in subject.opened.manifest.shards]
    others = list_other_files(subject.directory)
    # Half of the flips are drawn by size, nearly all in shards, and half evenly over the files.
    sizes = np.array([path.stat().st_size for path in shards + others])
    by_size = random.choice(len(sizes), NUM_FLIPS // 2, p=sizes / sizes.sum())
    evenly = np.arange(NUM_FLIPS - len(by_size)) % len(sizes)
    num_in_tokens = 0
    for number in (*by_size, *evenly):
        path = (shards + others)[number]
        content = path.read_bytes()
        place, bit = int(random.integers(len(content))), int(random.integers(8))
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        assert verify_dataset(subject.directory).problems, (path, place, bit)
        if path.name in OPENING_REFUSES:
            with pytest.raises(DataError):
                TokenDataset.open(subject.directory)
        elif path in shards:
            num_in_tokens += check_shard(subject, int(number), place)
        path.write_bytes(content)
    assert num_in_tokens > NUM_FLIPS // 3
    assert not verify_dataset(subject.directory).problems


def list_other_files(directory: Path) -> list[Path]:
    """List all files except the shards: index files, manifest, tokenizer."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.suffix != ".tar"]
    assert {*OPENING_REFUSES, "tokenizer.model"} <= {path.name for path in files}
    return sorted(files)


def check_shard(subject: Subject, shard: int, place: int) -> bool:
    """Check that a flip in a shard is refused with its offset; return whether it hits a token."""
    hit = [
        (record, places.start)
        for record, places in enumerate(subject.token_places(shard), shard * SHARD_RECORDS)
        if place in places
    ]
    for dataset in (subject.opened, TokenDataset.open(subject.directory, retry_seconds=())):
        if not hit:
            # Headers and padding of the archive.
            assert np.array_equal(subject.read_all(dataset), subject.rows)
            continue
        ((record, start),) = hit
        offset = start + (place - start) // BLOCK_BYTES * BLOCK_BYTES
        where = rf"shard-0000{shard}\.tar, record 0000000{record}.*, offset {offset}, data row "
        # Data rows of one token hold every token.
        tokens = np.arange(subject.layout.record_num_tokens(record)) + record * RECORD_TOKENS
        with pytest.raises(DataError, match=where):
            dataset.rows(tokens, 1)
    return bool(hit)
