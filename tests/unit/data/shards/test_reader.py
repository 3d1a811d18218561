"""Reading of data rows: equal to a plain numpy reference; errors name the data row."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eso.data.shards.manifest import decode_manifest, read_manifest
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.errors import DataError
from tests.support.processes import HANG_SECONDS

MakeDataset = Callable[..., npt.NDArray[np.int64]]

LARGE_RECORD_TOKENS = 70_000


def cut_rows(
    tokens: npt.NDArray[np.int64], record_tokens: int, sequence_length: int
) -> npt.NDArray[np.int64]:
    """Cut each record into whole data rows, as a reference for the reader."""
    rows = []
    for start in range(0, len(tokens), record_tokens):
        record = tokens[start : start + record_tokens]
        usable = len(record) // sequence_length * sequence_length
        rows.append(record[:usable].reshape(-1, sequence_length))
    return np.concatenate(rows)


@pytest.mark.parametrize("vocab_size", [50_000, 70_000])
@pytest.mark.parametrize(
    ("num_tokens", "record_tokens"), [(200_000, 70_000), (70_000, 70_000), (999, 10_000), (500, 50)]
)
def test_rows_equal_the_reference(
    tmp_path: Path, make_dataset: MakeDataset, vocab_size: int, num_tokens: int, record_tokens: int
) -> None:
    directory = tmp_path / "data"
    tokens = make_dataset(directory, num_tokens, record_tokens, vocab_size=vocab_size)
    dataset = TokenDataset.open(directory)
    assert dataset.manifest.dtype == ("u16" if vocab_size <= 2**16 else "u32")
    assert dataset.vocab_size == vocab_size
    assert dataset.mask_token_id == 4
    random = np.random.default_rng(0)
    for sequence_length in (1, 7, 50):
        expected = cut_rows(tokens, record_tokens, sequence_length)
        assert dataset.num_rows(sequence_length) == len(expected)
        for indices in (
            np.arange(len(expected)),
            random.integers(0, len(expected), 300),
            np.array([], dtype=np.int64),
        ):
            rows = dataset.rows(indices, sequence_length)
            assert rows.dtype == np.int64
            assert np.array_equal(rows, expected[indices])


@pytest.fixture(scope="module")
def large(
    tmp_path_factory: pytest.TempPathFactory, make_dataset: MakeDataset
) -> tuple[TokenDataset, npt.NDArray[np.int64]]:
    directory = tmp_path_factory.mktemp("large") / "data"
    tokens = make_dataset(directory, 300_000, LARGE_RECORD_TOKENS, shard_records=2)
    return TokenDataset.open(directory), tokens


@settings(max_examples=40, deadline=None)
@given(
    sequence_length=st.integers(1, 70_000),
    places=st.lists(st.floats(0, 1, exclude_max=True), max_size=20),
    run=st.integers(0, 30),
)
def test_any_length_and_any_rows_equal_the_reference(
    large: tuple[TokenDataset, npt.NDArray[np.int64]],
    sequence_length: int,
    places: list[float],
    run: int,
) -> None:
    dataset, tokens = large
    expected = cut_rows(tokens, LARGE_RECORD_TOKENS, sequence_length)
    scattered = (np.array(places, dtype=np.float64) * len(expected)).astype(np.int64)
    together = np.arange(min(run, len(expected)))
    indices = np.concatenate([scattered, together])
    assert np.array_equal(dataset.rows(indices, sequence_length), expected[indices])


def test_a_sequence_longer_than_a_record_is_refused(
    tmp_path: Path, make_dataset: MakeDataset
) -> None:
    make_dataset(tmp_path / "data", 300, 100)
    dataset = TokenDataset.open(tmp_path / "data")
    with pytest.raises(DataError, match="no data row of 101 tokens"):
        dataset.num_rows(101)


def test_rows_out_of_range_are_refused(tmp_path: Path, make_dataset: MakeDataset) -> None:
    make_dataset(tmp_path / "data", 300, 100)
    dataset = TokenDataset.open(tmp_path / "data")
    for index in (-1, 30):
        with pytest.raises(IndexError):
            dataset.rows(np.array([index]), 10)


def test_damage_names_the_row_that_was_read(tmp_path: Path, make_dataset: MakeDataset) -> None:
    directory = tmp_path / "data"
    make_dataset(directory, 110_000, 40_000)
    dataset = TokenDataset.open(directory, retry_seconds=())
    shard = directory / "shard-00000.tar"
    content = bytearray(shard.read_bytes())
    content[dataset.manifest.layout.record_offset(1) + 5 * 2000 + 1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="row 45 is damaged"):
        dataset.rows(np.array([3, 45, 7]), 1000)
    # Data rows of other blocks can still be read.
    dataset.rows(np.array([3, 79, 7]), 1000)


def test_other_versions_and_inconsistent_manifests_are_refused(
    tmp_path: Path, make_dataset: MakeDataset
) -> None:
    directory = tmp_path / "data"
    make_dataset(directory, 300, 100)
    manifest, dataset_id = read_manifest(directory)
    path = directory / "manifest.json"
    assert decode_manifest(path.read_bytes(), path) == manifest
    assert path.read_bytes() == manifest.encode()
    assert len(dataset_id) == 64
    newer = path.read_text().replace('"format_version": 1', '"format_version": 2')
    with pytest.raises(DataError, match="format_version 2, this program reads 1"):
        decode_manifest(newer.encode(), path)
    foreign = b'{"format": "other"}'
    with pytest.raises(DataError, match="is not a manifest"):
        decode_manifest(foreign, path)


def test_a_folder_of_splits_names_them(tmp_path: Path, make_dataset: MakeDataset) -> None:
    make_dataset(tmp_path / "train", 300, 100)
    with pytest.raises(DataError, match=r"several datasets; give .*train"):
        TokenDataset.open(tmp_path)
    with pytest.raises(DataError, match="no such directory"):
        TokenDataset.open(tmp_path / "absent")


def test_threads_read_the_same_rows(tmp_path: Path, make_dataset: MakeDataset) -> None:
    directory = tmp_path / "data"
    tokens = make_dataset(directory, 200_000, 5_000, shard_records=1)
    expected = cut_rows(tokens, 5_000, 100)
    dataset = TokenDataset.open(directory)
    wrong = []

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(50):
            indices = random.integers(0, len(expected), 20)
            if not np.array_equal(dataset.rows(indices, 100), expected[indices]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_reading_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['megatron'] = None\n"
        "import megatron_eso.data.samples.order, megatron_eso.data.shards.reader\n"
        "import data_tools.__main__"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANG_SECONDS)
