"""Wrong command lines of the tools, drawn from a seed, and what a command answers to each."""

import contextlib
import io
import random
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import checkpoints_conversion.__main__
import data_tools.__main__
import megatron_eso.sampler.__main__
import pretrain.evaluate
import pretrain.sensitivity
from megatron_eso.errors import run_command

MAINS: dict[str, Callable[[list[str] | None], int | None]] = {
    "data_tools": data_tools.__main__.main,
    "checkpoints_conversion": checkpoints_conversion.__main__.main,
    "sampler": megatron_eso.sampler.__main__.main,
    "evaluate": pretrain.evaluate.main,
    "sensitivity": pretrain.sensitivity.main,
}

GOLDEN = Path(__file__).parents[1] / "golden"

CPU_SECONDS = 60
"""Of this process, so that other processes do not matter; a correct answer takes milliseconds."""

NO_REALS = ("", "x", "nan", "inf", "-inf", "1e400", "9" * 5000, "-1")
NO_NUMBERS = (*NO_REALS, "9" * 30)
NO_COUNTS = (*NO_NUMBERS, "1.5", "0x10", "1 2")
NO_SIZES = (*NO_COUNTS, "0")
NO_SHARES = (*NO_REALS, "1.5", "0,5")
NO_PATHS = ("nowhere", "nowhere/deeper", "", "x" * 300)
NO_CHOICES = ("", "x", "EMA")
NO_WEIGHTS = {"--weights": NO_CHOICES}
NO_STEP = {"--step": (*NO_COUNTS, "99")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """What exists, and what the commands could read."""

    folder: Path
    text: Path
    tokenizer: Path
    shards: Path
    sampler: Path
    run: Path

    @property
    def no_outputs(self) -> tuple[str, ...]:
        """Paths at which nothing can be written."""
        below = f"{self.text}/out"
        return (
            below,
            f"{below}/deeper",
            "/proc/nowhere/out",
            "/proc/out",
            "",
            ".",
            "x" * 300,
            "x" * 250,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """How a command ended."""

    arguments: list[str]
    kind: str
    """`right`, `traceback`, `hang`, `several lines`, or `exit code N`."""
    error: str


Command = tuple[str, dict[str, list[str]], dict[str, tuple[str, ...]]]
"""The tool, its right arguments by name, and wrong values by name. A name without dashes is not
part of the command line."""


def list_commands(places: Places) -> list[Command]:
    """Every command with arguments that are right, and what is wrong for each."""
    return [
        *_data_commands(places),
        *_reading_commands(places),
        *_conversion_commands(places),
        *_model_commands(places),
    ]


def _data_commands(places: Places) -> list[Command]:
    # Values that several commands share.
    text, tokenizer = [str(places.text)], [str(places.tokenizer)]
    out, bad_out = [str(places.folder / "out")], places.no_outputs
    layout = {"--record-tokens": NO_SIZES, "--shard-records": NO_SIZES}
    reading = {
        "--input": NO_PATHS,
        "--on-error": NO_CHOICES,
        "--document-separator": ("", "\\x"),
    }
    validation = {"--validation": (*NO_SHARES, "0", "1")}
    # Each command: arguments that are right, and wrong values for each.
    return [
        (
            "data_tools",
            {"": ["train-tokenizer"], "--input": text, "--vocab-size": ["300"], "--out": out},
            {**reading, "--vocab-size": NO_SIZES, "--out": bad_out, "--model-type": NO_CHOICES},
        ),
        (
            "data_tools",
            {"": ["build"], "--input": text, "--tokenizer": tokenizer, "--out": out},
            {
                **reading,
                **layout,
                **validation,
                "--tokenizer": NO_PATHS,
                "--out": bad_out,
                "--workers": NO_SIZES,
                "--part": ("", "x", "1", "2/2", "-1/2", "1/0", "0/" + "9" * 5000),
                "--shuffle": (*NO_COUNTS, str(2**64)),
            },
        ),
        ("data_tools", {"": ["merge"], "out": out}, {"out": bad_out, "--workers": NO_SIZES}),
        (
            "data_tools",
            {
                "": ["import-tokens"],
                **{"--from": ["megatron"], "--input": text, "--tokenizer": tokenizer},
                "--out": out,
            },
            {
                **layout,
                **validation,
                **{"--from": NO_CHOICES, "--input": NO_PATHS, "--tokenizer": NO_PATHS},
            },
        ),
        ("data_tools", {"": ["corpus"], "--out": out}, {"--out": bad_out}),
    ]


def _reading_commands(places: Places) -> list[Command]:
    shards = [str(places.shards / "train")]
    location = {"location": NO_PATHS, "--cache-gib": (*NO_REALS, "0")}
    layers = ["quickstart.toml", f"data.train={shards[0]}", "data.sequence_length=64"]
    layers.append(f"run.directory={places.folder / 'no_run'}")
    no_layers = {"layers": ("nowhere", "nowhere.toml", "run.seed=x", "a.b=1")}
    length = {"--sequence-length": NO_SIZES}
    return [
        ("data_tools", {"": ["verify"], "location": shards}, location),
        (
            "data_tools",
            {"": ["inspect"], "location": shards},
            {**location, **length, "--row": NO_COUNTS},
        ),
        ("data_tools", {"": ["bench"], "location": shards}, {**location, **length}),
        (
            "data_tools",
            {"": ["blend"], "layers": layers},
            {**no_layers, "--tokens": NO_COUNTS},
        ),
        (
            "data_tools",
            {"": ["order"], "layers": layers, "--sample": ["3"]},
            {**no_layers, "--sample": (*NO_COUNTS, "9" * 19)},
        ),
    ]


def _conversion_commands(places: Places) -> list[Command]:
    # Values that several commands share.
    run, sampler = [str(places.run)], [str(places.sampler)]
    out, bad_out = [str(places.folder / "out")], places.no_outputs
    choice, step, mask = NO_WEIGHTS, NO_STEP, {"--mask-token-id": NO_COUNTS}
    # Each command: arguments that are right, and wrong values for each.
    return [
        (
            "checkpoints_conversion",
            {"": ["to-sampler"], "run": run, "out": out},
            {"run": NO_PATHS, "out": bad_out, **step, **choice, "--dtype": NO_CHOICES},
        ),
        (
            "checkpoints_conversion",
            {"": ["from-hf"], "directory": sampler, "out": out},
            {
                **{"directory": (*NO_PATHS, *sampler), "out": bad_out},
                **{"--tokenizer": NO_PATHS, "--seed": NO_COUNTS},
            },
        ),
        (
            "checkpoints_conversion",
            {"": ["to-hf"], "sampler": sampler, "out": out},
            {"sampler": NO_PATHS, "out": bad_out},
        ),
        (
            "checkpoints_conversion",
            {"": ["from-official"], "ckpt": [str(GOLDEN / "tiny.ckpt")], "out": out},
            {"ckpt": NO_PATHS, "out": bad_out, **choice, **mask, "--tokenizer": NO_PATHS},
        ),
        (
            "checkpoints_conversion",
            {"": ["to-megatron"], "sampler": sampler, "run": out},
            {"sampler": NO_PATHS, "run": bad_out},
        ),
        (
            "checkpoints_conversion",
            {"": ["verify"], "a": run, "b": sampler},
            {"a": NO_PATHS, "b": NO_PATHS, **step, **mask, "--tolerance": NO_REALS},
        ),
    ]


def _model_commands(places: Places) -> list[Command]:
    # Values that several commands share.
    sampler, text = [str(places.sampler)], [str(places.text)]
    evaluated = {"run": [str(places.run)], "--data": [str(places.shards / "validation")]}
    not_evaluated = {
        "run": NO_PATHS,
        **NO_STEP,
        **NO_WEIGHTS,
        "--data": NO_PATHS,
        "overrides": ("x", "model.num_layers=3", "a.b=1", "validation.num_samples=-1"),
    }
    # Each command: arguments that are right, and wrong values for each.
    return [
        (
            "sampler",
            {"": ["sample"], "directory": sampler},
            {
                "directory": NO_PATHS,
                **{name: NO_SIZES for name in ("--num-samples", "--length", "--steps")},
                **{name: NO_SHARES for name in ("--alpha-0", "--top-p")},
                "--num-samples": (*NO_SIZES, "99999999999"),
                "--steps": (*NO_SIZES, "99999999999"),
                "--temperature": NO_REALS,
                "--seed": (*NO_COUNTS, str(2**64)),
                "--dtype": NO_CHOICES,
                "--device": ("", "cdua", "cpu:x", "cuda:99", "tpu", "meta"),
            },
        ),
        (
            "sampler",
            {"": ["score"], "directory": sampler, "file": text},
            {"directory": NO_PATHS, "file": NO_PATHS, "--batch-size": NO_SIZES},
        ),
        ("evaluate", evaluated, {**not_evaluated, "--any-order": NO_SIZES}),
        ("sensitivity", evaluated, not_evaluated),
    ]


def draw_wrong(commands: list[Command], seed: int, number: int) -> Iterator[tuple[str, list[str]]]:
    """Draw tools with arguments, of which one is wrong."""
    draw = random.Random(seed)
    for _ in range(number):
        tool, right, wrong = draw.choice(commands)
        name = draw.choice(sorted(wrong))
        value = draw.choice(wrong[name])
        arguments: list[str] = []
        for each, values in {**right, name: [value]}.items():
            kept = [*right.get(name, []), value] if each == name == "layers" else values
            # A value that begins with a dash needs `=`.
            arguments += [f"{each}={kept[0]}"] if each.startswith("--") else kept
        yield tool, arguments


def answer(tool: str, arguments: list[str]) -> Answer:
    """Run a command in this process, and return how it ended."""
    stderr = io.StringIO()
    kind = "right"
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            with _time_limit():
                run_command(MAINS[tool], arguments)
        except SystemExit as end:
            kind = f"exit code {end.code}" if end.code != 2 else "right"
        except TimeoutError:
            kind = "hang"
        except BaseException:  # noqa: BLE001 - whatever escapes shows a traceback
            kind = "traceback"
            traceback.print_exc()
    error = stderr.getvalue()
    if kind == "right" and (error.count("\n") != 1 or len(error) > 1000):
        kind = "several lines"
    return Answer(arguments=[tool, *arguments], kind=kind, error=error)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
