"""Passing faults are retried a few times; lasting ones become one line with shard and offset.

The faults are real: bytes that change on disk, files that are cut, replaced or missing, and EIO,
which Linux returns for unmapped memory of a process.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from megatron_eso.data.shards.format import BLOCK_BYTES
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.errors import DataError

MakeDataset = Callable[..., npt.NDArray[np.int64]]
Break = Callable[[Path], None]

LENGTH = 1000
RECORD_TOKENS = 40_000
NUM_ROWS = 110
# Header, description of the shard; header, 80,000 bytes padded to sectors; header.
SECOND_RECORD = 512 + 512 + 512 + 80_384 + 512
RETRY_SECONDS = (0.0, 0.01, 0.01)
UNMAPPED = Path("/proc/self/mem")


def flip_bit(shard: Path) -> None:
    """Flip a bit in the second block of the second record; data row 56 is the first to reach it."""
    content = bytearray(shard.read_bytes())
    content[SECOND_RECORD + BLOCK_BYTES + 5] ^= 1
    with shard.open("r+b") as file:
        file.write(content)


def cut_off(shard: Path) -> None:
    """Cut the file in data row 48, the ninth of the second record."""
    os.truncate(shard, SECOND_RECORD + 8 * 2 * LENGTH + 1)


def replace_by_directory(shard: Path) -> None:
    shard.unlink()
    shard.mkdir()


def replace_by_unmapped_memory(shard: Path) -> None:
    shard.unlink()
    shard.symlink_to(UNMAPPED)


def remove(shard: Path) -> None:
    shard.unlink()


@pytest.fixture
def shard(tmp_path: Path, make_dataset: MakeDataset) -> Path:
    make_dataset(tmp_path / "data", NUM_ROWS * LENGTH, RECORD_TOKENS, shard_records=2)
    return tmp_path / "data" / "shard-00000.tar"


@contextmanager
def repairing(shard: Path, sound: bytes, after: int) -> Iterator[list[str]]:
    """Replace the shard by a sound file at the n-th warning of the reader."""
    messages: list[str] = []

    class Repair(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())
            if len(messages) == after:
                copy = shard.with_suffix(".copy")
                copy.write_bytes(sound)
                copy.replace(shard)

    handler = Repair()
    logger = logging.getLogger("megatron_eso.data.shards.checked_blocks")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("fault", [flip_bit, cut_off, replace_by_unmapped_memory])
@pytest.mark.parametrize("is_open", [False, True])
def test_a_fault_that_passes_is_waited_for(shard: Path, fault: Break, is_open: bool) -> None:
    sound = shard.read_bytes()
    dataset = TokenDataset.open(shard.parent, retry_seconds=RETRY_SECONDS)
    expected = TokenDataset.open(shard.parent).rows(np.arange(NUM_ROWS), LENGTH)
    if is_open:
        dataset.rows(np.arange(3), LENGTH)
    fault(shard)
    with repairing(shard, sound, after=len(RETRY_SECONDS)) as messages:
        assert np.array_equal(dataset.rows(np.arange(NUM_ROWS), LENGTH), expected)
    # A handle that was open before the file was replaced still reads the old one.
    if not (is_open and fault is replace_by_unmapped_memory):
        assert len(messages) == len(RETRY_SECONDS)
        assert all(message.startswith(f"{shard}, offset ") for message in messages)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (flip_bit, "row 56, sample 5056 is damaged: the block's hash differs; "),
        (cut_off, "row 48, sample 5048 is cut off; "),
        (replace_by_unmapped_memory, "cannot be read: Input/output error; "),
    ],
)
def test_a_fault_that_stays_is_one_line_in_the_end(shard: Path, fault: Break, problem: str) -> None:
    dataset = TokenDataset.open(shard.parent, retry_seconds=RETRY_SECONDS)
    fault(shard)
    rows = np.arange(NUM_ROWS)
    with repairing(shard, b"", after=0) as messages, pytest.raises(DataError) as raised:
        dataset.rows(rows, LENGTH, sample_indices=5000 + rows)
    assert len(messages) == len(RETRY_SECONDS)
    line = str(raised.value)
    assert problem in line
    assert line.startswith(f"{shard}, record 0000000")
    assert f"of dataset {dataset.dataset_id} in data.quarantine" in line
    assert "\n" not in line
    # The other shard can still be read.
    dataset.rows(np.arange(80, NUM_ROWS), LENGTH)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [(replace_by_directory, "Is a directory"), (remove, "No such file or directory")],
)
def test_a_fault_that_cannot_pass_fails_at_once(shard: Path, fault: Break, problem: str) -> None:
    dataset = TokenDataset.open(shard.parent, retry_seconds=(60.0,))
    fault(shard)
    with repairing(shard, b"", after=0) as messages, pytest.raises(DataError, match=problem):
        dataset.rows(np.array([7]), LENGTH)
    assert not messages
