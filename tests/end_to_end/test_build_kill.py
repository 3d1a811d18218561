"""`build` killed by `kill -9` at random moments and run again: the bytes of an undisturbed run."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from data_tools.builds.dataset import merge_parts
from data_tools.builds.journal import SpanFiles, read_state
from data_tools.text.embedded_corpus import write_corpus
from data_tools.tokenizer_training import TokenizerOptions, train_tokenizer
from tests.support.processes import HANG_SECONDS

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
MOMENTS_OF_TEN_COMMITS = 60
"""Before and after each of the three flushes of a commit."""
PROGRAM = """
import itertools, json, os, signal, sys
from pathlib import Path
from data_tools.builds.dataset import BuildOptions, Part, build_dataset
settings, what, moment = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
moments, flush = itertools.count(1), os.fsync
def pass_moment():
    if next(moments) == moment:
        if what == "SIGKILL":
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGSTOP)
def flush_between_moments(descriptor):
    pass_moment()
    flush(descriptor)
    pass_moment()
os.fsync = flush_between_moments
def count_event(event, arguments):
    is_note = event == "os.remove" and os.fspath(arguments[0]).endswith(".npz")
    if event == "os.rename" or is_note:
        pass_moment()
sys.addaudithook(count_event)
settings["out"] = Path(settings["out"])
if "part" in settings:
    settings["part"] = Part(**settings["part"])
build_dataset(BuildOptions(**settings))
print(next(moments))
"""


@dataclass(frozen=True)
class Corpus:
    """A text, a tokenizer and the hashes of the dataset that they give."""

    inputs: list[str]
    tokenizer: str
    hashes: dict[str, str]
    num_moments: int
    """Moments of a build: before and after each flush, before each rename and note's removal."""


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
    arguments = Corpus(inputs, str(tokenizer), {}, 0)
    (num_moments, *_) = finish(start(arguments, straight, 1)).split()[-1:]
    return Corpus(inputs, str(tokenizer), hash_tree(straight), int(num_moments))


def start(
    corpus: Corpus,
    out: Path,
    num_workers: int,
    what: str = "SIGKILL",
    moment: int = 0,
    **settings: object,
) -> subprocess.Popen[bytes]:
    """Start a build that kills its process group, or stops itself, at a moment; 0: never."""
    settings |= SETTINGS | {
        "inputs": corpus.inputs,
        "tokenizer": corpus.tokenizer,
        "out": str(out),
        "num_workers": num_workers,
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(settings), what, str(moment)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes], *codes: int) -> str:
    """Wait until a build and its workers have ended, and return its output."""
    output, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode in (codes or (0,)), errors.decode()
    return output.decode()


def catch_at_work(
    corpus: Corpus, out: Path, moment: int, num_workers: int = 1
) -> subprocess.Popen[bytes]:
    """Start a build, and wait until it has stopped itself at a moment."""
    process = start(corpus, out, num_workers, "SIGSTOP", moment)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    return process


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
def test_killed_builds_continue_and_give_the_same_bytes(corpus: Corpus, tmp_path: Path) -> None:
    """Kills are spread over both stages, by the work that was done."""
    draw, num_builds, num_kills = random.Random(), 0, 0
    while num_kills < NUM_KILLS:
        out, building = tmp_path / str(num_builds), tmp_path / f"{num_builds}.building"
        num_builds += 1
        while num_kills < NUM_KILLS and kill_at_random(corpus, out, draw):
            num_kills += 1
        if building.exists() or not out.exists():
            finish(start(corpus, out, draw.choice((1, 2))))
        assert hash_tree(out) == corpus.hashes
        assert not building.exists()
    print(f"{num_kills} kills in {num_builds} builds of {corpus.num_moments} moments")


def kill_at_random(corpus: Corpus, out: Path, draw: random.Random) -> bool:
    """Continue a build up to a random moment, kill it, and check that no work was repeated.

    Returns:
        Whether it was killed: it may have had less work left.
    """
    journals, notes = read_journals(out), stat_notes(out)
    moment = draw.randrange(1, 2 * corpus.num_moments // NUM_KILLS)
    process = start(corpus, out, draw.choice((1, 2)), "SIGKILL", moment)
    finish(process, 0, -signal.SIGKILL)
    # What was committed stays as it was, and what follows continues it.
    after = read_journals(out)
    if after:  # else one rename has put all of them elsewhere: every span is packed
        for name, journal in journals.items():
            assert after[name].startswith(keep_whole_lines(journal))
    if not out.exists():  # else the notes are being removed
        found = stat_notes(out)
        assert {name: found[name] for name in notes} == notes
    return process.returncode != 0


def test_workers_end_with_their_parent(corpus: Corpus, tmp_path: Path) -> None:
    process = catch_at_work(corpus, tmp_path / "out", MOMENTS_OF_TEN_COMMITS, num_workers=2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    finish(process, -signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=HANG_SECONDS)
    assert len(children) >= 2
    assert not alive


def test_a_journal_cut_anywhere_is_read_up_to_its_last_whole_line(
    corpus: Corpus, tmp_path: Path
) -> None:
    """Cut the journal as a crash of the machine may; the build then gives the same bytes."""
    out = tmp_path / "out"
    finish(start(corpus, out, 1, "SIGKILL", MOMENTS_OF_TEN_COMMITS), -signal.SIGKILL)
    building = out.with_name(f"{out.name}.building")
    files = SpanFiles(directory=building / "spans", number=1)
    whole = files.journal.read_bytes()
    units = [json.loads(line)["num_units"] for line in whole.splitlines() if line]
    assert len(units) >= 5
    for size in range(len(whole), 0, -1):
        os.truncate(files.journal, size)
        num_lines = whole.count(b"\n", 0, size)
        assert read_state(files).num_units == (units[num_lines - 1] if num_lines else 0)
    files.journal.write_bytes(whole[: len(whole) // 2])
    # As after a crash, the other files may hold more than the journal counts, or garbage behind it.
    with files.tokens.open("ab") as tokens:
        tokens.write(b"garbage")
    finish(start(corpus, out, 1))
    assert hash_tree(out) == corpus.hashes


def test_a_live_build_is_not_disturbed(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = catch_at_work(corpus, out, MOMENTS_OF_TEN_COMMITS)
    second = start(corpus, out, 1)
    _, errors = second.communicate(timeout=HANG_SECONDS)
    assert second.returncode != 0
    assert b"another process is writing" in errors
    process.send_signal(signal.SIGCONT)
    finish(process)
    assert hash_tree(out) == corpus.hashes


def test_parts_that_start_at_once_share_a_build(corpus: Corpus, tmp_path: Path) -> None:
    """An array of jobs: no part finds a plan, one writes it; one part is killed."""
    out = tmp_path / "out"
    parts = [{"number": number, "count": 3} for number in range(3)]
    moments = (0, MOMENTS_OF_TEN_COMMITS, 0)
    processes = [
        start(corpus, out, 1, "SIGKILL", moment, part=part)
        for part, moment in zip(parts, moments, strict=True)
    ]
    finish(processes[1], -signal.SIGKILL)
    processes[1] = start(corpus, out, 1, part=parts[1])
    for process in processes:
        finish(process)
    merge_parts(out)
    assert hash_tree(out) == corpus.hashes
