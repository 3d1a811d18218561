"""How a run fares, read from its directory: `python -m pretrain.status RUN_DIR [--watch]`.

Needs neither torch nor a GPU, and disturbs nothing: run it over ssh on any machine that sees the
directory.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_eso.errors import ConfigError, run_command
from megatron_eso.quantities import format_seconds

_CLEAR_SCREEN = "\033[H\033[2J"
_TAIL_BYTES = 64 * 1024
# A run says something at every line of its log; this long without one is worth a word.
_SILENCE_SECONDS = 600.0

Status = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    """Print the status once, or every few seconds until the run ends.

    Raises:
        ConfigError: the directory holds no run.
    """
    parser = argparse.ArgumentParser(prog="python -m pretrain.status", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=5.0,
        default=None,
        metavar="SECONDS",
        help="print again every so many seconds (5), until the run has ended",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a time")
    arguments = parser.parse_args(argv)
    while True:
        status = read_status(arguments.run)
        if arguments.json:
            text = json.dumps(to_json(status)) + "\n"
        else:
            text = "".join(f"{line}\n" for line in describe(arguments.run, status, time.time()))
        clear = _CLEAR_SCREEN if arguments.watch and sys.stdout.isatty() else ""
        sys.stdout.write(clear + text)
        sys.stdout.flush()
        if not arguments.watch or status["state"] in ("finished", "failed"):
            return
        time.sleep(arguments.watch)


def read_status(run: Path) -> Status:
    """`status.json` with what the newest lines of `metrics.jsonl` and the checkpoints add.

    Raises:
        ConfigError: the directory holds no run.
    """
    path = run / "status.json"
    try:
        status: Status = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(
            f"{run}: holds no status.json; name the run.directory of a run that has started"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    checkpoints = sorted((run / "checkpoints").glob("step_" + "[0-9]" * 8))
    if checkpoints:
        status["last_checkpoint"] = checkpoints[-1].name
        status["last_checkpoint_time"] = checkpoints[-1].stat().st_mtime
    for values in _read_tail(run / "metrics.jsonl"):
        status.setdefault("metrics", {}).update(values)
    return status


def describe(run: Path, status: Status, now: float) -> Iterator[str]:
    """The status, a line for each thing to know; `now` in seconds since the epoch."""
    metrics = status.get("metrics", {})
    age = now - status["time"]
    job = f"job {status['job']}, " if status.get("job") else ""
    reason = f": {status['reason']}" if status.get("reason") else ""
    yield f"run          {run}"
    yield (
        f"state        {status['state']}{reason} ({job}process {status['pid']} on "
        f"{status['host']}), {format_seconds(age)} ago"
    )
    if status["state"] == "running" and age > _SILENCE_SECONDS:
        yield f"             no sign of life for {format_seconds(age)}: look into {run / 'logs'}"
    num_steps = status.get("num_steps")
    share = f"/{num_steps} ({100 * status['step'] / num_steps:.1f} %)" if num_steps else ""
    yield f"step         {status['step']}{share}"
    if "train/loss" in metrics:
        phases = ", ".join(
            f"{tag.removeprefix('train/loss_')} {value:.4f}"
            for tag, value in metrics.items()
            if tag.startswith("train/loss_")
        )
        yield (
            f"loss         {metrics['train/loss']:.4f} ({phases}), skipped steps "
            f"{metrics['train/skipped_steps']:.0f}, times gone back "
            f"{metrics['train/rollbacks']:.0f}"
        )
    if "val/nelbo" in metrics:
        yield (
            f"validation   NELBO {metrics['val/nelbo']:.4f}, perplexity "
            f"{metrics['val/perplexity']:.2f}"
        )
    if "perf/tokens_per_second" in metrics:
        mfu = f", MFU {100 * metrics['perf/mfu']:.1f} %" if "perf/mfu" in metrics else ""
        yield (
            f"speed        {metrics['perf/tokens_per_second']:.0f} tokens/s, "
            f"{metrics['perf/step_seconds']:.3f} s a step{mfu}"
        )
    if status["state"] == "running" and "seconds_left" in status:
        yield f"ETA          {format_seconds(status['seconds_left'])}"
    if "last_checkpoint" in status:
        written = format_seconds(now - status["last_checkpoint_time"])
        yield f"checkpoint   {status['last_checkpoint']}, {written} ago"
    else:
        yield "checkpoint   none yet"
    if "restarts" in status:
        yield f"restarts     {status['restarts']}"
    if "hosts" in status:
        yield (
            f"nodes        {len(status['hosts'])}: {', '.join(status['hosts'])}; "
            f"{status['num_ranks']} ranks"
        )


def to_json(status: Status) -> Status:
    """The status with text in place of what JSON has no number for."""
    metrics = {
        tag: value if math.isfinite(value) else str(value)
        for tag, value in status.get("metrics", {}).items()
    }
    return status | {"metrics": metrics}


def _read_tail(path: Path) -> Iterator[dict[str, float]]:
    """The last whole lines of metrics.jsonl; training and validation lines alternate there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return
    for line in lines:
        try:
            # What is not finite is text there.
            yield {key: float(value) for key, value in json.loads(line).items()}
        except (ValueError, TypeError, AttributeError):  # cut by the window, or being written
            continue


if __name__ == "__main__":
    run_command(main)
