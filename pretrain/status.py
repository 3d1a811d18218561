"""Prints the state of a run, read from its directory.

It needs neither torch nor a GPU and changes nothing, so it can run on any machine that reads the
directory, also while the run trains.
"""

import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eso.command_line import CommandLine, positive_real
from megatron_eso.errors import ConfigError, run_command
from megatron_eso.quantities import format_seconds
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.status import RunStatus, read_recent_metrics
from megatron_eso.runs.steps import newest
from megatron_eso.training.records import tags

_CLEAR_SCREEN = "\033[H\033[2J"
# A run writes its status with every line of its log; a longer silence is reported.
_SILENCE_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Facts about a run from the files of its directory.

    Attributes:
        run: The run directory.
        status: Content of `status.json`.
        metrics: The newest values of `metrics.jsonl`, by tag.
        checkpoint: The newest checkpoint; None if the run has none.
    """

    run: RunDirectory
    status: RunStatus
    metrics: dict[str, float]
    checkpoint: Path | None


def main(argv: list[str] | None = None) -> None:
    """Print the state of a run once, or every few seconds until the run ends.

    Raises:
        ConfigError: The directory holds no run.
    """
    parser = CommandLine(prog="python -m pretrain.status", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--watch",
        type=positive_real,
        nargs="?",
        const=5.0,
        default=None,
        metavar="SECONDS",
        help="print again every SECONDS (default: 5) until the run ends",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object each time")
    arguments = parser.parse_args(argv)
    while True:
        report = read_report(RunDirectory(arguments.run))
        if arguments.json:
            text = json.dumps(to_json(report)) + "\n"
        else:
            text = "".join(f"{line}\n" for line in describe_run(report, time.time()))
        clear = _CLEAR_SCREEN if arguments.watch and sys.stdout.isatty() else ""
        sys.stdout.write(clear + text)
        sys.stdout.flush()
        if not arguments.watch or report.status.state in ("finished", "failed"):
            return
        time.sleep(arguments.watch)


def read_report(run: RunDirectory) -> Report:
    """Read the files of a run directory.

    Raises:
        ConfigError: The directory holds no run.
    """
    status = run.read_status()
    if status is None:
        raise ConfigError(
            f"{run.path}: holds no status.json; name the run.directory of a run that has started"
        )
    return Report(
        run=run,
        status=status,
        metrics=read_recent_metrics(run.metrics),
        checkpoint=newest(run.checkpoints),
    )


def describe_run(report: Report, now: float) -> Iterator[str]:
    """Yield the state of a run as lines of text.

    Args:
        report: Facts about the run.
        now: Present time in seconds since the epoch.
    """
    # The run and its process.
    status, metrics = report.status, report.metrics
    age = now - status.time
    job = f"job {status.job}, " if status.job else ""
    reason = f": {status.reason}" if status.reason else ""
    yield f"run          {report.run.path}"
    yield (
        f"state        {status.state}{reason} ({job}process {status.pid} on {status.host}), "
        f"updated {format_seconds(age)} ago"
    )
    yield from _describe_silence(report, age)
    # How far it is, and how well it trains.
    yield f"step         {_describe_step(status)}"
    if tags.LOSS in metrics:
        yield f"loss         {_describe_loss(metrics)}"
    if tags.VAL_NELBO in metrics:
        yield (
            f"validation   NELBO {metrics[tags.VAL_NELBO]:.4f}, perplexity "
            f"{metrics[tags.VAL_PERPLEXITY]:.2f}"
        )
    if tags.TOKENS_PER_SECOND in metrics:
        mfu = f", MFU {100 * metrics[tags.MFU]:.1f} %" if tags.MFU in metrics else ""
        yield (
            f"speed        {metrics[tags.TOKENS_PER_SECOND]:.0f} tokens/s, "
            f"{metrics[tags.STEP_SECONDS]:.3f} s a step{mfu}"
        )
    if status.state == "running" and status.seconds_left is not None:
        yield f"ETA          {format_seconds(status.seconds_left)}"
    # What remains of it if it ends, and where it runs.
    if report.checkpoint is not None:
        written = format_seconds(now - report.checkpoint.stat().st_mtime)
        yield f"checkpoint   {report.checkpoint.name}, {written} ago"
    else:
        yield "checkpoint   none yet"
    if status.restarts is not None:
        yield f"restarts     {status.restarts}"
    if status.hosts is not None:
        yield (
            f"nodes        {len(status.hosts)}: {', '.join(status.hosts)}; {status.num_ranks} "
            f"{'rank' if status.num_ranks == 1 else 'ranks'}"
        )


def _describe_silence(report: Report, age: float) -> Iterator[str]:
    """Yield a line if a run that states to be running may have ended; `age` is in seconds."""
    if is_gone(report.status):
        yield (
            f"             its process is gone and wrote no reason: read {report.run.logs}, "
            f"and start the run again"
        )
    elif report.status.state == "running" and age > _SILENCE_SECONDS:
        yield f"             no update for {format_seconds(age)}: read {report.run.logs}"


def _describe_step(status: RunStatus) -> str:
    """Return the step, with its share of the run if the number of steps is known."""
    if not status.num_steps:
        return str(status.step)
    if status.step > status.num_steps:
        return f"{status.step}, past train.num_steps = {status.num_steps}"
    return f"{status.step}/{status.num_steps} ({100 * status.step / status.num_steps:.1f} %)"


def is_gone(status: RunStatus) -> bool:
    """Return whether a run that states to be running has no process on this host.

    For a run on another host the answer is False.
    """
    if status.state != "running" or status.host != socket.gethostname():
        return False
    try:
        os.kill(status.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # the process of another user
        return False
    return False


def _describe_loss(metrics: dict[str, float]) -> str:
    """Return the loss, that of each phase, and the numbers of skipped steps and rollbacks."""
    phases = [
        f"{phase} {value:.4f}"
        for tag, value in metrics.items()
        if (phase := tags.phase_of_loss(tag)) is not None
    ]
    return (
        f"{metrics[tags.LOSS]:.4f} ({', '.join(phases)}), skipped steps "
        f"{metrics[tags.SKIPPED_STEPS]:.0f}, rollbacks {metrics[tags.ROLLBACKS]:.0f}"
    )


def to_json(report: Report) -> dict[str, Any]:
    """Return the report as one JSON object, where values that are not finite are text."""
    content = report.status.to_json()
    if report.checkpoint is not None:
        content["last_checkpoint"] = report.checkpoint.name
        content["last_checkpoint_time"] = report.checkpoint.stat().st_mtime
    content["metrics"] = {
        tag: value if math.isfinite(value) else str(value) for tag, value in report.metrics.items()
    }
    return content


if __name__ == "__main__":
    run_command(main)
