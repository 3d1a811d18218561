"""Time and memory of `build`, compared with the tokenizer and Megatron-LM's preprocess_data.py.

MEGATRON_LM names a checkout of Megatron-LM whose tools/preprocess_data.py runs here, for example of
its tag core_v0.15.3; without it that comparison is left out. All get the same JSONL of English
paragraphs, the same SentencePiece model and two workers. Times are those beyond what the same
command takes for one document (imports, loading the tokenizer), best of three rounds in turns.
"""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest

from data_tools.text.embedded_corpus import collect_documents
from data_tools.tokenizer_training import TokenizerOptions, train_tokenizer
from megatron_eso.data.tokenizers.tokenizer import Tokenizer

NUM_WORKERS = 2
NUM_ROUNDS = 3
SPEED_BYTES = 100_000_000
SMALL_BYTES, NUM_COPIES = 100_000_000, 10
LARGEST_GROWTH = 1.5  # of the peak memory, for ten times the text
VOCAB_SIZE = 4000
BATCH_DOCUMENTS = 500
POLL_SECONDS = 0.2


def write_text(path: Path, num_bytes: int) -> None:
    """JSONL of random paragraphs of English."""
    documents = collect_documents(Path(sysconfig.get_path("stdlib")))
    paragraphs = [part for text in documents for part in text.split("\n\n") if part]
    draw = random.Random(0)
    with path.open("w") as file:
        while file.tell() < num_bytes:
            text = "\n\n".join(draw.choices(paragraphs, k=draw.randint(3, 30)))
            file.write(json.dumps({"text": text}) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tokenizer` and `one.jsonl`."""
    folder = tmp_path_factory.mktemp("build")
    write_text(folder / "sample.jsonl", 5_000_000)
    train_tokenizer(
        TokenizerOptions(
            inputs=[str(folder / "sample.jsonl")], vocab_size=VOCAB_SIZE, out=folder / "tokenizer"
        )
    )
    write_text(folder / "one.jsonl", 1)
    return folder


def start_build(folder: Path, text: Path) -> subprocess.Popen[bytes]:
    out = folder / "shards"
    shutil.rmtree(out, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "data_tools", "build", "--input", str(text), "--out", str(out)),
        *("--tokenizer", str(folder / "tokenizer"), "--workers", str(NUM_WORKERS)),
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def start_megatron(folder: Path, text: Path) -> subprocess.Popen[bytes]:
    checkout = os.environ["MEGATRON_LM"]
    command = [
        *(sys.executable, f"{checkout}/tools/preprocess_data.py", "--input", str(text)),
        *("--output-prefix", str(folder / "megatron"), "--workers", str(NUM_WORKERS)),
        *("--tokenizer-type", "SentencePieceTokenizer", "--append-eod"),
        *("--tokenizer-model", str(folder / "tokenizer" / "tokenizer.model")),
    ]
    environment = os.environ | {"PYTHONPATH": checkout}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


@dataclass(frozen=True)
class Taken:
    """Seconds by the clock, and of the cores' time."""

    wall: float
    cpu: float

    def __sub__(self, other: "Taken") -> "Taken":
        return Taken(self.wall - other.wall, self.cpu - other.cpu)


def smallest(times: list[Taken]) -> Taken:
    return Taken(min(taken.wall for taken in times), min(taken.cpu for taken in times))


def measure(run: Callable[[], object]) -> Taken:
    """Time something that waits for its processes and all below them."""
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    run()
    return Taken(time.perf_counter() - wall, sum(os.times()[:4]) - cpu)


def encode_part(tokenizer: Path, text: Path, part: int) -> Taken:
    """Encode every NUM_WORKERS-th document, read and parsed before."""
    encoder = Tokenizer.load(tokenizer)
    with text.open("rb") as file:
        lines = [line for number, line in enumerate(file) if number % NUM_WORKERS == part]
    documents = [json.loads(line)["text"].encode() for line in lines]

    def encode() -> None:
        for first in range(0, len(documents), BATCH_DOCUMENTS):
            encoder.encode_batch(documents[first : first + BATCH_DOCUMENTS])

    return measure(encode)


def measure_tokenizer(folder: Path, text: Path) -> Taken:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(NUM_WORKERS, mp_context=spawn) as pool:
        encode = partial(encode_part, folder / "tokenizer", text)
        parts = list(pool.map(encode, range(NUM_WORKERS)))
    return Taken(max(part.wall for part in parts), sum(part.cpu for part in parts))


@pytest.mark.bench
def test_speed_of_build(folder: Path) -> None:
    text, one = folder / "text.jsonl", folder / "one.jsonl"
    write_text(text, SPEED_BYTES)

    def run(start: Callable[[Path, Path], subprocess.Popen[bytes]], text: Path) -> Taken:
        def wait() -> None:
            assert start(folder, text).wait() == 0

        return measure(wait)

    # Measure each command on the whole text, and on one document for the time of its start.
    commands = {"build": start_build}
    if "MEGATRON_LM" in os.environ:
        commands["preprocess_data.py of Megatron-LM"] = start_megatron
    alone, whole, started = [], {way: [] for way in commands}, {way: [] for way in commands}
    for _ in range(NUM_ROUNDS):
        alone.append(measure_tokenizer(folder, text))
        for way, start in commands.items():
            whole[way].append(run(start, text))
            started[way].append(run(start, one))
    # The smallest of each: the smallest of their differences would reward a slow start.
    best = {way: smallest(whole[way]) - smallest(started[way]) for way in commands}
    best["the tokenizer alone"] = smallest(alone)
    for way, taken in best.items():
        print(
            f"{way:<34} {taken.wall:5.1f} s ({text.stat().st_size / 1e6 / taken.wall:4.1f} MB/s), "
            f"{taken.cpu:5.1f} CPU s; build is {taken.wall / best['build'].wall:.2f}x as fast, "
            f"{taken.cpu / best['build'].cpu:.2f}x by CPU time"
        )


def measure_memory(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Peak MB of a process and all below it, shared pages counted once; and seconds."""
    began, peak = time.perf_counter(), 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        try:
            for member in (root, *root.children(recursive=True)):
                total += member.memory_full_info().pss
        except psutil.Error:
            continue  # one ended meanwhile
        peak = max(peak, total)
        time.sleep(POLL_SECONDS)
    assert process.returncode == 0
    return peak / 1e6, time.perf_counter() - began


@pytest.mark.bench
def test_memory_of_build_is_flat(folder: Path) -> None:
    small, large = folder / "small.jsonl", folder / "large.jsonl"
    write_text(small, SMALL_BYTES)
    with large.open("wb") as file:
        for _ in range(NUM_COPIES):
            file.write(small.read_bytes())
    small_peak, small_seconds = measure_memory(start_build(folder, small))
    large_peak, large_seconds = measure_memory(start_build(folder, large))
    print(
        f"peak memory of build, {NUM_WORKERS} workers: {large.stat().st_size / 1e6:.0f} MB of text "
        f"{large_peak:.0f} MB ({large_seconds:.0f} s), {small.stat().st_size / 1e6:.0f} MB "
        f"{small_peak:.0f} MB ({small_seconds:.0f} s): {large_peak / small_peak:.2f}x"
    )
    assert large_peak < LARGEST_GROWTH * small_peak
