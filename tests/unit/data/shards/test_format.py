"""Shards on disk: plain archives, the same bytes for the same tokens."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from megatron_eso.data.shards.format import ShardLayout, choose_dtype
from megatron_eso.data.shards.manifest import read_manifest

MakeDataset = Callable[..., npt.NDArray[np.int64]]


def hash_tree(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_members_lie_where_the_arithmetic_says(tmp_path: Path, make_dataset: MakeDataset) -> None:
    make_dataset(tmp_path / "data", 200_000, 30_000)
    manifest, _ = read_manifest(tmp_path / "data")
    record = 0
    for shard in manifest.shards:
        with tarfile.open(tmp_path / "data" / shard.name, "r:") as archive:
            meta, *members = archive.getmembers()
            assert meta.name == "__meta__/shard.json"
            for member in members:
                assert member.offset_data == manifest.layout.record_offset(record)
                assert member.size == manifest.layout.record_bytes(record)
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                record += 1
    assert record == manifest.layout.num_records


@given(
    num_tokens=st.integers(1, 5000),
    record_tokens=st.integers(1, 700),
    shard_records=st.integers(1, 5),
    sequence_length=st.integers(1, 800),
)
def test_layout_counts_every_record_once(
    num_tokens: int, record_tokens: int, shard_records: int, sequence_length: int
) -> None:
    layout = ShardLayout(
        dtype="u16",
        record_tokens=record_tokens,
        shard_records=shard_records,
        num_tokens=num_tokens,
    )
    sizes = [layout.record_num_tokens(record) for record in range(layout.num_records)]
    assert sum(sizes) == num_tokens
    assert min(sizes) > 0
    in_shards = [layout.shard_num_records(shard) for shard in range(layout.num_shards)]
    assert sum(in_shards) == layout.num_records
    assert layout.num_rows(sequence_length) == sum(size // sequence_length for size in sizes)


def test_same_tokens_give_the_same_bytes(tmp_path: Path, make_dataset: MakeDataset) -> None:
    make_dataset(tmp_path / "a", 10_000, 3_000)
    make_dataset(tmp_path / "b", 10_000, 3_000)
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")


def test_documents_file_names_the_document_of_each_record(
    tmp_path: Path, make_dataset: MakeDataset
) -> None:
    tokens = make_dataset(tmp_path / "data", 10_000, 3_000)
    manifest, _ = read_manifest(tmp_path / "data")
    starts = np.fromfile(tmp_path / "data" / "documents.u64", dtype="<u8")
    is_end = tokens == 2
    assert manifest.num_documents == is_end.sum()
    assert starts.tolist() == [int(is_end[:start].sum()) for start in range(0, 10_000, 3_000)]


def test_narrowest_type_holds_the_vocabulary() -> None:
    assert choose_dtype(2**16) == "u16"
    assert choose_dtype(2**16 + 1) == "u32"
