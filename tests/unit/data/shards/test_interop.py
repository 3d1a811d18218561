"""Other readers of WebDataset shards deliver the tokens that our reader delivers."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import webdataset

from megatron_eso.data.shards.reader import TokenDataset
from tests.support.processes import HANG_SECONDS

MakeDataset = Callable[..., npt.NDArray[np.int64]]
Tokens = npt.NDArray[np.int64]

ROOT = Path(__file__).parents[4]
INTEROP_PYTHON = ROOT / ".venv-interop" / "bin" / "python"

NUM_TOKENS, RECORD_TOKENS, LENGTH = 200_000, 30_000, 1000
KEYS = [f"{record:08d}" for record in range(7)]
VOCABULARIES = {"u16": 50_000, "u32": 70_000}
DTYPES = {"u16": "<u2", "u32": "<u4"}


def read_records(directory: Path) -> list[Tokens]:
    """Read the records by our reader, each as a data row of its own length."""
    dataset = TokenDataset.open(directory)
    layout = dataset.manifest.layout
    records = []
    for record in range(layout.num_records):
        length = layout.record_num_tokens(record)
        (tokens,) = dataset.rows(np.array([record * (layout.record_tokens // length)]), length)
        records.append(tokens)
    return records


@pytest.mark.parametrize("dtype", VOCABULARIES)
def test_webdataset_reads_the_same_tokens(
    tmp_path: Path, make_dataset: MakeDataset, dtype: str
) -> None:
    directory = tmp_path / "data"
    vocab_size = VOCABULARIES[dtype]
    written = make_dataset(directory, NUM_TOKENS, RECORD_TOKENS, vocab_size=vocab_size)
    shards = sorted(str(path) for path in directory.glob("shard-*.tar"))
    assert len(shards) == 3
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == KEYS
    found = [np.frombuffer(sample[f"tokens.{dtype}"], DTYPES[dtype]) for sample in samples]
    assert np.array_equal(np.concatenate(found), written)
    for record, expected in zip(found, read_records(directory), strict=True):
        assert np.array_equal(record, expected)


def test_energon_reads_the_same_tokens(tmp_path: Path, make_dataset: MakeDataset) -> None:
    if not INTEROP_PYTHON.exists():
        message = f"{INTEROP_PYTHON} is missing: make test makes it"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)
    paths = []
    for dtype, vocab_size in VOCABULARIES.items():
        make_dataset(tmp_path / dtype, NUM_TOKENS, RECORD_TOKENS, vocab_size=vocab_size)
        paths += [tmp_path / dtype, tmp_path / f"{dtype}.npz"]
    subprocess.run(
        [INTEROP_PYTHON, ROOT / "tests" / "support" / "read_with_energon.py", *paths],
        check=True,
        timeout=HANG_SECONDS,
    )
    for dtype in VOCABULARIES:
        with np.load(tmp_path / f"{dtype}.npz") as found:
            assert sorted(found) == KEYS
            for key, expected in zip(KEYS, read_records(tmp_path / dtype), strict=True):
                assert np.array_equal(found[key], expected)
