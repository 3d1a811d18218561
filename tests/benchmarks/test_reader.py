"""Random rows of 2048 tokens with hash checks, beside a plain memory map without any."""

import time
from pathlib import Path

import numpy as np
import pytest

from megatron_eso.data.reader import TokenDataset
from megatron_eso.data.shard_writer import DatasetWriter
from megatron_eso.data.tokenizer import Tokenizer

LENGTH = 2048
NUM_TOKENS = 32 * 2**20
NUM_ROWS = 4096
BATCH = 16


@pytest.mark.bench
def test_rows_with_hash_checks(tiny_data: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_data / "train" / "tokenizer")
    tokens = np.random.default_rng(0).integers(0, tokenizer.vocab_size, NUM_TOKENS)
    writer = DatasetWriter(
        tmp_path, tokenizer=tokenizer.fingerprint(), tokenizer_files=tokenizer.files()
    )
    writer.append(tokens)
    writer.finish(sources=[], num_text_bytes=0)
    tokens.astype("<u2").tofile(tmp_path / "plain.bin")
    rows = np.random.default_rng(1).permutation(NUM_TOKENS // LENGTH)[:NUM_ROWS].reshape(-1, BATCH)

    plain = np.memmap(tmp_path / "plain.bin", dtype="<u2").reshape(-1, LENGTH)
    began = time.perf_counter()
    for batch in rows:
        plain[batch].astype(np.int64)
    plain_rate = rows.size * LENGTH / (time.perf_counter() - began)

    dataset = TokenDataset.open(tmp_path)
    began = time.perf_counter()
    for batch in rows:
        dataset.rows(batch, LENGTH)
    rate = rows.size * LENGTH / (time.perf_counter() - began)
    print(
        f"reader with hash checks {rate:.2e} tokens/s, plain memory map {plain_rate:.2e} tokens/s: "
        f"{rate / plain_rate:.2f}x"
    )
