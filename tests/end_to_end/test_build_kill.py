"""`build` killed by `kill -9` at random moments and run again: the bytes of a run in peace."""

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from data_tools.builds.dataset import merge_parts
from data_tools.builds.journal import SpanFiles, read_state
from data_tools.text.embedded_corpus import write_corpus
from data_tools.tokenizer_training import TokenizerOptions, train_tokenizer
from tests.support.processes import HANG_SECONDS, freeze_when, kill_tree

NUM_KILLS = 20
NUM_COPIES = 10
SETTINGS = {
    "validation_share": 0.2,
    "deduplicate": True,
    "shuffle_seed": 3,
    # Small, so that there are many moments that differ: a commit for each unit, dozens of shards.
    "record_tokens": 2**15,
    "shard_records": 8,
    "span_bytes": 2**22,
    "commit_bytes": 1,
}
PROGRAM = """
import json, sys
from pathlib import Path
from data_tools.builds.dataset import BuildOptions, Part, build_dataset
settings = json.loads(sys.argv[1])
settings["out"] = Path(settings["out"])
if "part" in settings:
    settings["part"] = Part(**settings["part"])
build_dataset(BuildOptions(**settings))
"""


@dataclass(frozen=True)
class Corpus:
    """A text, a tokenizer and the hashes of the dataset that they give."""

    inputs: list[str]
    tokenizer: str
    hashes: dict[str, str]
    num_commits: int
    num_shards: int


def hash_tree(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "texts.jsonl")
    lines = (folder / "texts.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(lines[::20]))
    tokenizer = folder / "tokenizer"
    inputs = [str(folder / "few.jsonl"), str(folder / "many.jsonl")]
    train_tokenizer(TokenizerOptions(inputs=inputs[:1], vocab_size=500, out=tokenizer))
    with (folder / "many.jsonl").open("w") as many:
        for copy in range(NUM_COPIES):  # all but the first differ, and in their length
            for line in lines:
                text = json.loads(line)["text"]
                many.write(json.dumps({"text": text if copy == 0 else f"{copy} {text}"}) + "\n")
    straight = folder / "straight"
    arguments = Corpus(inputs, str(tokenizer), {}, 0, 0)
    process = start(arguments, straight, 1)
    counts = [0, 0]
    while process.poll() is None:
        counts = [max(pair) for pair in zip(counts, count_progress(straight), strict=True)]
        time.sleep(0.01)
    assert process.returncode == 0, process.stderr and process.stderr.read().decode()
    return Corpus(inputs, str(tokenizer), hash_tree(straight), *counts)


def start(
    corpus: Corpus, out: Path, num_workers: int, **settings: object
) -> subprocess.Popen[bytes]:
    settings |= SETTINGS | {
        "inputs": corpus.inputs,
        "tokenizer": corpus.tokenizer,
        "out": str(out),
        "num_workers": num_workers,
    }
    command = [sys.executable, "-c", PROGRAM, json.dumps(settings)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def catch_at_work(
    corpus: Corpus, folder: Path, num_commits: int, num_workers: int = 1
) -> tuple[subprocess.Popen[bytes], Path]:
    """A build that is stopped after some commits, and its dataset; one too quick is done again."""
    for number in itertools.count():
        out = folder / f"out_{number}"
        process = start(corpus, out, num_workers)
        if freeze_when(process, lambda out=out: count_progress(out)[0] >= num_commits):
            return process, out
        assert process.returncode == 0, process.stderr and process.stderr.read().decode()
    raise AssertionError


def count_progress(out: Path) -> tuple[int, int]:
    """Lines of all journals, and shards that are packed."""
    building = out.with_name(f"{out.name}.building")
    journals = read_journals(out).values()
    return (
        sum(journal.count(b"\n") for journal in journals),
        sum(1 for _ in building.glob("packing/*/*.npz")),
    )


def read_journals(out: Path) -> dict[str, bytes]:
    building = out.with_name(f"{out.name}.building")
    return {path.name: path.read_bytes() for path in building.glob("spans/*.journal")}


def stat_notes(out: Path) -> dict[str, tuple[int, int]]:
    building = out.with_name(f"{out.name}.building")
    return {
        f"{path.parent.name}/{path.name}": (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in building.glob("packing/*/*.npz")
    }


def keep_whole_lines(journal: bytes) -> bytes:
    return journal[: journal.rfind(b"\n") + 1]


@pytest.mark.slow
def test_killed_builds_go_on_and_give_the_same_bytes(corpus: Corpus, tmp_path: Path) -> None:
    """Kills are spread over both stages, by the work that was done, plus a moment."""
    draw = random.Random()
    total = corpus.num_commits + corpus.num_shards
    assert total > 1.5 * NUM_KILLS
    num_rounds, num_kills = 0, 0
    while num_kills < NUM_KILLS:
        out = tmp_path / str(num_rounds)
        num_rounds += 1
        targets = sorted(draw.sample(range(total), NUM_KILLS - num_kills))
        for target in targets:
            num_kills += kill_at(corpus, out, target, draw)
        process = start(corpus, out, draw.choice((1, 2)))
        _, errors = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 0, errors.decode()
        assert hash_tree(out) == corpus.hashes
        assert not out.with_name(f"{out.name}.building").exists()
    print(f"{num_kills} kills in {num_rounds} builds")


def kill_at(corpus: Corpus, out: Path, target: int, draw: random.Random) -> bool:
    """Run until `target` commits and shards are there, kill, and see that nothing was done twice.

    Returns:
        Whether it was killed before it was finished.
    """
    journals, notes = read_journals(out), stat_notes(out)
    process = start(corpus, out, draw.choice((1, 2)))
    deadline = time.monotonic() + HANG_SECONDS
    while process.poll() is None and sum(count_progress(out)) < target:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.03))
    if process.poll() is not None:
        assert process.returncode == 0, process.stderr and process.stderr.read().decode()
        return False
    kill_tree(process)
    if process.returncode == 0:
        return False
    # What was committed stays as it was, and what follows continues it.
    after = read_journals(out)
    if after:
        for name, journal in journals.items():
            assert after[name].startswith(keep_whole_lines(journal))
    found = stat_notes(out)
    if found:
        assert {name: found[name] for name in notes} == notes
    return True


def test_workers_end_with_their_parent(corpus: Corpus, tmp_path: Path) -> None:
    process, _ = catch_at_work(corpus, tmp_path, 3, num_workers=2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=HANG_SECONDS)
    assert len(children) >= 2
    assert not alive


def test_a_journal_cut_anywhere_is_read_up_to_its_last_whole_line(
    corpus: Corpus, tmp_path: Path
) -> None:
    """A torn write, which a crash of the machine leaves: the same bytes in the end."""
    process, out = catch_at_work(corpus, tmp_path, 10)
    kill_tree(process)
    building = out.with_name(f"{out.name}.building")
    files = SpanFiles(directory=building / "spans", number=1)
    whole = files.journal.read_bytes()
    units = [json.loads(line)["num_units"] for line in whole.splitlines() if line]
    for size in range(len(whole), 0, -1):
        os.truncate(files.journal, size)
        num_lines = whole.count(b"\n", 0, size)
        assert read_state(files).num_units == (units[num_lines - 1] if num_lines else 0)
    files.journal.write_bytes(whole[: len(whole) // 2])
    # As after a crash, the other files may hold more than the journal tells, or garbage behind.
    with files.tokens.open("ab") as tokens:
        tokens.write(b"garbage")
    process = start(corpus, out, 1)
    _, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, errors.decode()
    assert hash_tree(out) == corpus.hashes


def test_a_live_build_is_not_disturbed(corpus: Corpus, tmp_path: Path) -> None:
    process, out = catch_at_work(corpus, tmp_path, 1)
    second = start(corpus, out, 1)
    _, errors = second.communicate(timeout=HANG_SECONDS)
    assert second.returncode != 0
    assert b"another process is writing" in errors
    process.send_signal(signal.SIGCONT)
    assert process.wait(HANG_SECONDS) == 0
    assert hash_tree(out) == corpus.hashes


def test_parts_that_start_at_once_share_a_build(corpus: Corpus, tmp_path: Path) -> None:
    """An array of jobs: all of them find nothing there, one writes the plan; one is killed."""
    out = tmp_path / "out"
    processes = [start(corpus, out, 1, part={"number": number, "count": 3}) for number in range(3)]
    while count_progress(out)[0] < 3:
        time.sleep(0.005)
    kill_tree(processes[1])
    processes[1] = start(corpus, out, 1, part={"number": 1, "count": 3})
    for process in processes:
        _, errors = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 0, errors.decode()
    merge_parts(out)
    assert hash_tree(out) == corpus.hashes
