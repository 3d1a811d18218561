"""Random wrong configurations, and how a dry run ends with each.

`python -m tests.support.wrong_configurations DATA SEED COUNT` counts the ends by their kind.
"""

import json
import random
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron_eso.config.sections import KEYS, SECTIONS
from megatron_eso.errors import UserError
from pretrain.train import main
from tests.support.training import tiny_arguments

SHOWN_CHARACTERS = 100
"""An error shows at least so much of a long name."""
CPU_SECONDS = 20.0
"""Of the processor's time, which a busy machine does not change; a dry run takes a fraction."""
VALUES = [
    *("-1", "0", "1", "2", "3", "7", "1.5", "-0.1", "1e5", "1e11", "1e308", "1e999", "nan", "-inf"),
    *("99999999999", "9223372036854775807", "9223372036854775808", "9" * 5000, "0x" + "f" * 5000),
    *(
        "true",
        "false",
        "null",
        "None",
        "",
        " ",
        '""',
        '"\\u0000"',
        '"a\\u0000b"',
        "abc",
        "s3://b/r",
    ),
    *("[]", "[[]]", "{}", "[1, 2]", '["a"]', '["a", ""]', '["a", "a"]', "[1e308, 1e308]"),
    *(
        "[" * 3000,
        "x" * 300,
        "x" * 5000,
        "a/" + "y" * 300,
        "README.md/x",
        ".",
        "..",
        "/",
        "nowhere",
    ),
    *("/proc/1/x", "ftp://host/x", "Ett|ttL", "E|" * 50 + "L", "bf16", "1979-05-27", "\u2028"),
]
FILES = [
    b"",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xef\xbb\xbf[run]\nseed = -1\n",
    b"[run\n",
    b"run = 1\n",
    b"seed = 1\n",
    b"[model]\nnum_layers = 4x\n",
    b"[model]\nnum_layers = \n",
    b"[model]\nnum_layers = 4\nnum_layers = 4\n",
    b"[model.deep]\nnum_layers = 4\n",
    b"[[model]]\nnum_layers = 4\n",
    b"[run]\nseed = " + b"[" * 100_000,
    b"[run]\nseed = " + b"9" * 5000,
    b"[run]\n" + b"k" * 5000 + b" = 1\n",
    b"\x00",
    b"{}",
    b'{"format_version": 1}',
    b'{"format_version": 1, "run": 3}',
]
NAMES = ["owt_small", "owt_smal.toml", "nowhere.toml", "x" * 300, ".", "", "a=b", "=", "run.seed"]
KEY_IN_LINE = re.compile("|".join(map(re.escape, sorted(KEYS, key=len, reverse=True))))


@dataclass(frozen=True, kw_only=True)
class End:
    """How a dry run ended: `accepted`, `refused`, or what must not be."""

    kind: str
    arguments: list[str]
    line: str = ""


class HangError(Exception):
    """A dry run took longer than any does."""


def draw_arguments(draw: random.Random, folder: Path) -> list[str]:
    """Draw what is wrong: one or two values, a key, a file, or the name of a file."""
    kind = draw.choices(["values", "key", "file", "name"], weights=[12, 1, 2, 1])[0]
    if kind == "values":
        keys = draw.sample(sorted(KEYS), draw.choice([1, 1, 2]))
        return [f"{key}={draw.choice(VALUES)}" for key in keys]
    if kind == "key":
        section, name = draw.choice([*SECTIONS, "modl", ""]), draw.choice(["hiden", "", "x" * 300])
        return [f"{section}.{name}={draw.choice(VALUES)}"]
    if kind == "name":
        return [draw.choice(NAMES)]
    path = folder / f"layer.{draw.choice(['toml', 'toml', 'json', 'yaml'])}"
    path.write_bytes(draw.choice(FILES))
    return [str(path)]


def run_wrong_configurations(data: Path, seed: int, count: int) -> Iterator[End]:
    """Yield how the dry runs of `count` configurations end, in this process."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(count):
            wrong = draw_arguments(draw, folder)
            yield end_dry_run([*tiny_arguments(folder / "run", data, {}), *wrong], wrong)


def end_dry_run(arguments: list[str], wrong: list[str]) -> End:
    """Run a dry run, and classify its end."""
    previous = signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        main([*arguments, "--dry-run"])
    except UserError as error:
        return End(kind=_judge_refusal(error, wrong), arguments=wrong, line=str(error))
    except HangError:
        return End(kind="hang", arguments=wrong)
    except SystemExit as error:
        return End(kind="argparse", arguments=wrong, line=str(error.code))
    except BaseException as error:
        return End(kind="traceback", arguments=wrong, line=f"{type(error).__name__}: {error}"[:200])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    return End(kind="accepted", arguments=wrong)


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise HangError


def _judge_refusal(error: UserError, wrong: list[str]) -> str:
    """Return `refused` where the line is as it should be, else what it lacks."""
    line = str(error)
    if error.exit_code != 2:
        return "exit code 1"
    if len(line) > 2000 or not line.isprintable():
        return "long or unprintable line"
    names = [argument.partition("=")[0][:SHOWN_CHARACTERS] for argument in wrong]
    names += [f"[{name.partition('.')[0]}]" for name in names]  # of a section that is none
    is_named = KEY_IN_LINE.search(line) or any(name in line for name in names)
    return "refused" if is_named and ": " in line else "no key, file or remedy"


def count_kinds(data: Path, seed: int, count: int) -> None:
    """Print the number of ends by kind, and those that are not refusals."""
    ends = list(run_wrong_configurations(data, seed, count))
    for end in ends:
        # What is accepted is for a reader to judge.
        if end.kind != "refused":
            shown = [argument[:80] for argument in end.arguments]
            sys.stderr.write(f"{end.kind}: {shown}: {end.line[:300]}\n")
    sys.stderr.write(json.dumps(Counter(end.kind for end in ends)) + "\n")


if __name__ == "__main__":
    count_kinds(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
