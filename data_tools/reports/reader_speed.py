"""`bench`: measures how fast random rows of a dataset are read and their hashes checked."""

import json
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_eso.data.remote.cache import ShardCache
from megatron_eso.data.remote.copies import copy_shards
from megatron_eso.data.remote.datasets import find_datasets, open_dataset
from megatron_eso.data.shards.reader import TokenDataset

SECONDS = 2.0
"""Time for which each way of reading is measured."""
BATCH_ROWS = 16
BATCHES_AHEAD = 2

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadSpeed:
    """Speed of one way of reading."""

    way: str
    tokens_per_second: float
    megabytes_per_second: float
    """Stored bytes of these tokens, without those that were read only for the hashes."""
    median_milliseconds: float
    """Time of a call."""
    p99_milliseconds: float


def bench_reader(
    location: str | Path,
    sequence_length: int,
    as_json: bool = False,
    cache: ShardCache | None = None,
) -> None:
    """Read random rows for SECONDS in each way, and print the speeds.

    Args:
        location: Directory or URL of a dataset, or of the folder of two splits, of which training
            is read.
        sequence_length: Tokens of a row.
        as_json: Whether to print one JSON object instead of text.
        cache: Holds local copies of remote shards; None: a cache in TMPDIR.

    Raises:
        DataError: A shard is damaged, or the dataset has no row of this length.
    """
    # The measurement, on shards that are local.
    found = find_datasets(location)[0]
    dataset = open_dataset(found, cache=cache)
    copy_shards([dataset.shards])
    batches = f"batches of {BATCH_ROWS} rows"
    ways = {
        "single rows": read_randomly(dataset, sequence_length, 1),
        batches: read_randomly(dataset, sequence_length, BATCH_ROWS),
        f"{batches}, a thread ahead": read_ahead(
            read_randomly(dataset, sequence_length, BATCH_ROWS)
        ),
    }
    speeds = [
        measure_speed(way, tokens, dataset.manifest.layout.itemsize) for way, tokens in ways.items()
    ]
    # The report.
    if as_json:
        report = {
            "location": found,
            "sequence_length": sequence_length,
            "ways": [asdict(speed) for speed in speeds],
        }
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
        return
    sys.stdout.write(f"{found}: random rows of {sequence_length} tokens, hashes checked\n")
    for speed in speeds:
        sys.stdout.write(
            f"  {speed.way:<35} {speed.tokens_per_second:.2e} tokens/s, "
            f"{speed.megabytes_per_second:7.1f} MB/s, a call {speed.median_milliseconds:.3f} ms "
            f"(median), {speed.p99_milliseconds:.3f} ms (99 %)\n"
        )


def read_randomly(dataset: TokenDataset, length: int, num_rows: int) -> Iterator[Int64]:
    """Yield batches of random rows without end, int64 [num_rows, length]."""
    draw = np.random.default_rng(0)
    in_dataset = dataset.num_rows(length)
    while True:
        yield dataset.rows(draw.integers(0, in_dataset, num_rows), length)


def read_ahead(batches: Iterator[Int64]) -> Iterator[Int64]:
    """Yield the same batches, which a thread reads while earlier ones are in use."""
    ready: queue.Queue[Int64 | Exception] = queue.Queue(BATCHES_AHEAD)
    is_over = threading.Event()

    def fill() -> None:
        try:
            for batch in batches:
                ready.put(batch)
                if is_over.is_set():
                    return
        except Exception as error:  # raised in the thread that takes the batches
            ready.put(error)

    threading.Thread(target=fill, daemon=True).start()
    try:
        while True:
            batch = ready.get()
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        is_over.set()
        # The thread may be waiting for room in the queue.
        with suppress(queue.Empty):
            ready.get_nowait()


def measure_speed(way: str, batches: Iterator[Int64], itemsize: int) -> ReadSpeed:
    """Measure the reading of batches for SECONDS, after an untimed one."""
    next(batches)
    num_tokens, seconds = 0, []
    now = began = time.perf_counter()
    while now - began < SECONDS:
        num_tokens += next(batches).size
        seconds.append(time.perf_counter() - now)
        now += seconds[-1]
    rate = num_tokens / (now - began)
    return ReadSpeed(
        way=way,
        tokens_per_second=rate,
        megabytes_per_second=rate * itemsize / 1e6,
        median_milliseconds=1e3 * float(np.median(seconds)),
        p99_milliseconds=1e3 * float(np.quantile(seconds, 0.99)),
    )
