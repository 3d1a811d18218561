"""Makes the same things with two checkouts and compares them.

    python -m tests.structure.compare_commits OLD_CHECKOUT NEW_CHECKOUT [--keep DIR]

Shards, training runs on several layouts, checkpoints, evaluation, sampler directories, samples,
scores, dry runs and refused command lines. Only command lines are used, which are the contract, so
any two commits can be compared. It prints a table, and ends with 1 where something differs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from tests.structure.commands import Command, list_products, plan_everything
from tests.structure.same_bytes import compare

NUM_DOCUMENTS = 60
COMMAND_SECONDS = 600
TIMED_OUT = 124


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command gave."""

    exit_code: int
    stdout: str
    stderr: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    what: str
    is_equal: bool
    where: str


def run_command(command: Command, checkout: Path, folder: Path) -> Outcome:
    """Run one command with a checkout's code, in its folder."""
    # The command, and an environment that only this checkout affects.
    launcher = ["torch.distributed.run", "--standalone"]
    launcher += [f"--nproc-per-node={command.num_ranks}", "-m"]
    module = [*(launcher if command.num_ranks else []), *command.arguments]
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
    }
    # Run it, for a limited time.
    began = time.monotonic()
    try:
        finished = subprocess.run(
            [sys.executable, "-m", *module],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_SECONDS,
        )
    except subprocess.TimeoutExpired:
        late = f"not finished after {COMMAND_SECONDS} s"
        return Outcome(exit_code=TIMED_OUT, stdout="", stderr=late, seconds=COMMAND_SECONDS)
    return Outcome(
        exit_code=finished.returncode,
        stdout=finished.stdout,
        stderr=finished.stderr,
        seconds=time.monotonic() - began,
    )


def make_everything(checkout: Path, folder: Path) -> dict[str, Outcome]:
    """Run all commands with a checkout, one after the other."""
    folder.mkdir(parents=True)
    outcomes = {}
    for command in plan_everything():
        outcomes[command.title] = run_command(command, checkout, folder)
        if command.title == "corpus":
            shorten_corpus(folder)
    return outcomes


def shorten_corpus(folder: Path) -> None:
    """Keep the first documents of the corpus, and two of them to score."""
    corpus = folder / "corpus.jsonl"
    if corpus.is_file():
        documents = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
        corpus.write_text("".join(documents[:NUM_DOCUMENTS]), encoding="utf-8")
        (folder / "scored.jsonl").write_text("".join(documents[:2]), encoding="utf-8")


def compare_checkouts(sides: dict[str, Path], folder: Path) -> list[Row]:
    """Make everything with both at the same time, and compare."""
    with ThreadPoolExecutor() as pool:
        jobs = {
            side: pool.submit(make_everything, checkout, folder / side)
            for side, checkout in sides.items()
        }
        outcomes = {side: job.result() for side, job in jobs.items()}
    rows = [
        compare_outcomes(command, outcomes["old"][command.title], outcomes["new"][command.title])
        for command in plan_everything()
    ]
    for what, path in list_products().items():
        compared = compare(folder / "old" / path, folder / "new" / path)
        rows.append(Row(what=what, is_equal=not compared.differences, where=str(compared)))
    return rows


def compare_outcomes(command: Command, old: Outcome, new: Outcome) -> Row:
    """Whether a command ended and answered alike."""
    where = f"{old.seconds:.1f} s and {new.seconds:.1f} s"
    codes = {old.exit_code, new.exit_code}
    if codes != {command.exit_code}:
        failed = new if new.exit_code != command.exit_code else old
        last = failed.stderr.strip().splitlines()[-1:] or [""]
        where = f"exit codes {old.exit_code} and {new.exit_code}: {last[0]:.150}"
        return Row(what=command.title, is_equal=False, where=where)
    difference = find_line(read_answer(command, old), read_answer(command, new), command.shows)
    return Row(what=command.title, is_equal=difference is None, where=difference or where)


def read_answer(command: Command, outcome: Outcome) -> list[str]:
    """Return the lines of a command's output that are compared."""
    text = {"": "", "stderr": outcome.stderr}.get(command.shows, outcome.stdout)
    return text.splitlines()


def find_line(old: list[str], new: list[str], shows: str) -> str | None:
    """Find the first line that differs; None where there is none."""
    if shows == "lines":
        new = [line for line in new if line in set(old)]
    pairs = zip_longest(old, new, fillvalue="(no line)")
    return next((f"{a!r:.150} and {b!r:.150}" for a, b in pairs if a != b), None)


def print_table(rows: list[Row]) -> None:
    """Print what is equal and what is not."""
    width = max(len(row.what) for row in rows)
    for row in rows:
        verdict = "equal" if row.is_equal else "DIFFERENT"
        print(f"{row.what:{width}} | {verdict:9} | {row.where}")


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.structure.compare_commits")
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT")
    parser.add_argument("new", type=Path, metavar="NEW_CHECKOUT")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new folder for what is made")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary)).resolve()
        sides = {"old": args.old.resolve(), "new": args.new.resolve()}
        rows = compare_checkouts(sides, folder)
    print_table(rows)
    num_different = sum(not row.is_equal for row in rows)
    print(f"{len(rows) - num_different} equal, {num_different} different,", end=" ")
    print(f"{time.monotonic() - began:.0f} s")
    return 1 if num_different else 0


if __name__ == "__main__":
    sys.exit(main())
