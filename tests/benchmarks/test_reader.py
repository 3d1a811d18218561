"""Random rows with hash checks through the prefetch thread, compared with WebDataset's iterator.

All on one core, from the page cache; every way hands out int64 batches of 64 rows. Ratios are of
tokens per second of the process's CPU time (both threads), which other work on the machine disturbs
less than wall time; both are printed, the best of three rounds in which all ways take turns.
"""

import io
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import webdataset

from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.data.shards.writer import DatasetWriter
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.objectives.objective import Step
from megatron_eso.training.steps.prefetch import StepPrefetcher

NUM_TOKENS = 32 * 2**20
LENGTH, SHORT_LENGTH = 2048, 1024
BATCH = 64
NUM_ROUNDS = 3
SHARD_RECORDS = 4096

Tokens = np.ndarray
Read = Callable[[], Iterator[Tokens]]


@dataclass(frozen=True)
class Batches:
    """The part of TrainingBatches that the prefetch thread calls, with rows for plans."""

    dataset: TokenDataset
    rows: Tokens

    def plan_step(self, step: Step, data_parallel_rank: int) -> "Plan":
        rows = self.rows[step.first_index : step.first_index + BATCH]
        return Plan(self.dataset.rows(rows, LENGTH) if len(rows) else np.empty(0))


@dataclass(frozen=True)
class Plan:
    tokens: Tokens

    def pin_memory(self) -> Self:
        return self


def write_plain_shards(folder: Path, tokens: Tokens, length: int, extension: str) -> list[str]:
    """WebDataset shards with a row of `length` tokens in each record."""
    folder.mkdir()
    paths = []
    rows = tokens.astype("<u2").reshape(-1, length)
    for start in range(0, len(rows), SHARD_RECORDS):
        paths.append(str(folder / f"{start:08d}.tar"))
        with tarfile.open(paths[-1], "w", format=tarfile.USTAR_FORMAT) as archive:
            for number, row in enumerate(rows[start : start + SHARD_RECORDS], start):
                data = io.BytesIO()
                if extension == "npy":
                    np.save(data, row)
                else:
                    data.write(row.tobytes())
                member = tarfile.TarInfo(f"{number:08d}.{extension}")
                member.size = data.tell()
                data.seek(0)
                archive.addfile(member, data)
    return paths


def batch_rows(rows: Iterator[Tokens], length: int) -> Iterator[Tokens]:
    batch, place = np.empty((BATCH, length), dtype=np.int64), 0
    for row in rows:
        batch[place] = row
        place += 1
        if place == BATCH:
            yield batch
            batch, place = np.empty((BATCH, length), dtype=np.int64), 0


@pytest.fixture
def ways(tiny_data: Path, tmp_path: Path) -> dict[str, Read]:
    """Return the ways of reading; each gives all tokens once."""
    # Write the same tokens in each format.
    tokenizer = Tokenizer.load(tiny_data / "train" / "tokenizer")
    tokens = np.random.default_rng(0).integers(5, tokenizer.vocab_size, NUM_TOKENS)
    tokens[999::1000] = tokenizer.eos_token_id
    (tmp_path / "ours").mkdir()
    writer = DatasetWriter(
        tmp_path / "ours", tokenizer=tokenizer.fingerprint(), tokenizer_files=tokenizer.files()
    )
    writer.append(tokens)
    writer.finish(sources=[], num_text_bytes=0)
    tokens.astype("<u2").tofile(tmp_path / "plain.bin")
    long_rows = write_plain_shards(tmp_path / "long", tokens, LENGTH, "bin")
    short_rows = write_plain_shards(tmp_path / "short", tokens, SHORT_LENGTH, "npy")
    plain = np.memmap(tmp_path / "plain.bin", dtype="<u2", mode="r").reshape(-1, LENGTH)
    dataset = TokenDataset.open(tmp_path / "ours")
    rows = np.random.default_rng(1).permutation(NUM_TOKENS // LENGTH)
    batches = Batches(dataset, rows)

    # Each way reads them in its own order of rows.
    def read_plain() -> Iterator[Tokens]:
        for batch in rows.reshape(-1, BATCH):
            yield plain[batch].astype(np.int64)

    def read_directly() -> Iterator[Tokens]:
        for batch in rows.reshape(-1, BATCH):
            yield dataset.rows(batch, LENGTH)

    def read_ahead() -> Iterator[Tokens]:
        with StepPrefetcher(batches, 0, 2) as prefetcher:
            step = Step(number=0, first_index=0, batch_size=BATCH)
            while step.first_index < len(rows):
                yield prefetcher.take(step).tokens
                step = step.next()

    def read_webdataset() -> Iterator[Tokens]:
        samples = webdataset.WebDataset(long_rows, shardshuffle=False)
        yield from batch_rows((np.frombuffer(s["bin"], "<u2") for s in samples), LENGTH)

    def read_webdataset_npy() -> Iterator[Tokens]:
        samples = webdataset.WebDataset(short_rows, shardshuffle=False).decode()
        yield from batch_rows((sample["npy"] for sample in samples), SHORT_LENGTH)

    return {
        "ours, prefetch thread": read_ahead,
        "ours, directly": read_directly,
        "plain memory map, no checks": read_plain,
        "webdataset, 2048 tokens a record": read_webdataset,
        "webdataset, 1024 tokens .npy, .decode()": read_webdataset_npy,
    }


@pytest.fixture
def one_core() -> Iterator[None]:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


@pytest.mark.bench
@pytest.mark.usefixtures("one_core")
def test_rows_with_hash_checks(ways: dict[str, Read]) -> None:
    wall = dict.fromkeys(ways, 0.0)
    cpu = dict.fromkeys(ways, 0.0)
    for _ in range(NUM_ROUNDS):
        for way, read in ways.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            num_tokens = sum(batch.size for batch in read())
            assert num_tokens == NUM_TOKENS
            wall[way] = max(wall[way], num_tokens / (time.perf_counter() - began))
            cpu[way] = max(cpu[way], num_tokens / (time.process_time() - cpu_began))
    ours = next(iter(ways))
    for way in ways:
        print(
            f"{way:<40} {wall[way]:.2e} tokens/s, {cpu[way]:.2e} tokens per CPU second; "
            f"{ours} over it: {cpu[ours] / cpu[way]:.2f}x"
        )
