"""Time from the imports to the first row: a corpus of 1e12 tokens compared with one of 1e9.

The manifest and the files next to the shards are as large as they would be; the shards are holes.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megatron_eso.data.shards.format import (
    BLOCK_BYTES,
    BLOCKS_FILE,
    DOCUMENTS_FILE,
    MANIFEST_FILE,
    RECORD_TOKENS,
    SHARD_RECORDS,
    ShardLayout,
    shard_name,
)
from megatron_eso.data.shards.manifest import HashedFile, Manifest, Source
from megatron_eso.data.tokenizers.tokenizer import Tokenizer

MEAN_DOCUMENT_TOKENS = 1000
SOURCE_TOKENS = 250_000_000

OPEN_AND_READ = """
import json, sys, time
from pathlib import Path
import numpy as np
from megatron_eso.config.loading import load_config
from megatron_eso.data.samples.training_data import TrainingData
def peak():
    # Not ru_maxrss: that starts with the peak of the process that this one was forked from.
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) * 1024 / 1e6
config = load_config(["pretrain/configs/owt_small.toml", f"data.train={sys.argv[1]}",
                      f"run.directory={sys.argv[1]}/run"]).config
before, began = peak(), time.perf_counter()
data = TrainingData.open(config.data, config.run.seed)
rows = data.rows(np.arange(1))
seconds = time.perf_counter() - began
assert rows.shape == (1, config.data.row_tokens)
print(json.dumps({"seconds": seconds, "megabytes": peak() - before}))
"""


def hashed(path: Path) -> HashedFile:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return HashedFile(name=path.name, bytes=path.stat().st_size, sha256=sha256)


def write_holes(directory: Path, num_tokens: int, tokenizer: Tokenizer) -> None:
    """Write a dataset of zeros without space on disk; all files but the shards have full size."""
    directory.mkdir()
    tokenizer.save(directory / "tokenizer")
    layout = ShardLayout(
        dtype="u16",
        record_tokens=RECORD_TOKENS,
        shard_records=SHARD_RECORDS,
        num_tokens=num_tokens,
    )
    # Shards without content on the disk, and the files that describe them.
    shards = []
    for shard in range(layout.num_shards):
        path = directory / shard_name(shard)
        with path.open("wb") as file:
            file.truncate(layout.shard_bytes(shard))
        shards.append(
            HashedFile(
                name=path.name,
                bytes=layout.shard_bytes(shard),
                sha256=hashlib.sha256(path.name.encode()).hexdigest(),
            )
        )
    blocks = directory / BLOCKS_FILE
    of_zeros = xxhash.xxh3_64_intdigest(bytes(BLOCK_BYTES))
    np.full(layout.num_blocks, of_zeros, dtype="<u8").tofile(blocks)
    documents = directory / DOCUMENTS_FILE
    starts = np.arange(layout.num_records) * (RECORD_TOKENS // MEAN_DOCUMENT_TOKENS)
    starts.astype("<u8").tofile(documents)
    num_sources = -(-num_tokens // SOURCE_TOKENS)
    # A manifest of the full size.
    manifest = Manifest(
        dtype=layout.dtype,
        record_tokens=layout.record_tokens,
        shard_records=layout.shard_records,
        num_tokens=num_tokens,
        num_documents=num_tokens // MEAN_DOCUMENT_TOKENS,
        num_text_bytes=4 * num_tokens,
        num_duplicates=None,
        split="all",
        validation_share=0.0,
        shuffle_seed=None,
        tokenizer=tokenizer.fingerprint(),
        tokenizer_files=tuple(hashed(path) for path in sorted((directory / "tokenizer").iterdir())),
        sources=tuple(
            Source(
                path=f"part-{number:05d}.jsonl.zst",
                bytes=10**9,
                sha256=hashlib.sha256(str(number).encode()).hexdigest(),
                num_documents=num_tokens // MEAN_DOCUMENT_TOKENS // num_sources,
            )
            for number in range(num_sources)
        ),
        shards=tuple(shards),
        blocks=hashed(blocks),
        documents=hashed(documents),
    )
    (directory / MANIFEST_FILE).write_bytes(manifest.encode())


@pytest.mark.bench
def test_start_on_a_large_corpus(tiny_data: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_data / "train" / "tokenizer")
    figures = {}
    for num_tokens in (10**9, 10**12):
        directory = tmp_path / f"{num_tokens}"
        write_holes(directory, num_tokens, tokenizer)
        command = [sys.executable, "-c", OPEN_AND_READ, str(directory)]
        runs = [
            json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            for _ in range(3)
        ]
        figures[num_tokens] = min(runs, key=lambda run: float(run["seconds"]))
    small, large = figures.values()
    print(
        f"imports done to first row: 1e12 tokens {large['seconds']:.2f} s and "
        f"{large['megabytes']:.0f} MB more memory, 1e9 tokens {small['seconds']:.2f} s and "
        f"{small['megabytes']:.0f} MB: {large['seconds'] / small['seconds']:.1f}x the time"
    )
