"""Sizes of the datasets that the tests of remote shards read, and their rows."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_eso.data.shards.reader import TokenDataset

MakeDataset = Callable[..., npt.NDArray[np.int64]]

LENGTH = 100

RECORD_TOKENS = 20_000

SHARD_RECORDS = 3

NUM_TOKENS = 7 * SHARD_RECORDS * RECORD_TOKENS  # 7 shards of some 120 KB

AMPLE_GIB = 0.1


def read_all(dataset: TokenDataset, seed: int = 0) -> npt.NDArray[np.int64]:
    """Read all rows in random order; return them in the dataset's order."""
    order = np.random.default_rng(seed).permutation(dataset.num_rows(LENGTH))
    rows = np.empty((len(order), LENGTH), dtype=np.int64)
    for part in np.array_split(order, 20):
        rows[part] = dataset.rows(part, LENGTH)
    return rows


def is_equal(remote: TokenDataset, local: Path) -> bool:
    dataset = TokenDataset.open(local)
    return remote.dataset_id == dataset.dataset_id and np.array_equal(
        read_all(remote), read_all(dataset)
    )


def list_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
