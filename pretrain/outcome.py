"""Tells a job script what to do now that its ranks have ended: finished, requeue or stop.

The word is on stdout and the reason on stderr. It takes the configuration that the ranks took,
looks at their run directory, and adds a line to its `restarts.jsonl`.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_eso.config.loading import load_config
from megatron_eso.config.shipped import SHIPPED_CONFIGS
from megatron_eso.errors import ConfigError, run_command
from megatron_eso.files import write_text
from megatron_eso.runs.run_directory import RunDirectory, list_checkpoints

MAX_FRUITLESS_RESTARTS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The end of one life of a run; a line of `restarts.jsonl`.

    Attributes:
        decision: What the job script is to do.
        reason: Why, in a line.
        step: Of the newest complete checkpoint, 0 without one.
        job: Slurm's number of it, none outside Slurm.
        restart: How often Slurm had started this job before.
        time: In seconds since 1970.
    """

    decision: Literal["finished", "requeue", "stop"]
    reason: str
    step: int
    job: str | None
    restart: int
    time: float


def main(argv: list[str] | None = None) -> None:
    """Print the decision.

    Raises:
        ConfigError: The configuration is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.outcome", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("layers", nargs="+", metavar="CONFIG.toml|section.key=value")
    parser.add_argument("--directory", action="store_true", help="print the run directory instead")
    arguments = parser.parse_intermixed_args(argv)
    run = RunDirectory(
        Path(load_config(arguments.layers, folder=SHIPPED_CONFIGS).config.run.directory)
    )
    if arguments.directory:
        sys.stdout.write(f"{run.path}\n")
        return
    outcome = judge(run, job=os.environ.get("SLURM_JOB_ID"))
    lines = [json.dumps(each) + "\n" for each in (*read_restarts(run), asdict(outcome))]
    write_text(run.path / "restarts.jsonl", "".join(lines))
    sys.stderr.write(f"{outcome.decision}: {outcome.reason}\n")
    sys.stdout.write(f"{outcome.decision}\n")


def judge(run: RunDirectory, job: str | None) -> Outcome:
    """Decide what becomes of `run` after the ranks of `job` have ended.

    What they wrote in `status.json` counts, and whether checkpoints have grown since the restarts
    before; launchers hide exit codes. A run that another process holds is left alone.
    """
    try:
        with run.locked():
            pass
    except ConfigError as error:
        return make_outcome(run, job, "stop", str(error))
    state, reason = read_end(run, job)
    step = newest_step(run)
    if state == "finished":
        return make_outcome(run, job, "finished", reason)
    if state == "failed" and reason.startswith("ConfigError"):
        return make_outcome(run, job, "stop", reason)
    if run.stop_file.exists():
        reason = f"{run.stop_file} asks for it; submit again to go on"
        return make_outcome(run, job, "stop", reason)
    if count_fruitless(read_restarts(run), step) >= MAX_FRUITLESS_RESTARTS:
        return make_outcome(
            run,
            job,
            "stop",
            f"{MAX_FRUITLESS_RESTARTS} restarts in a row made no checkpoint after step {step}; the "
            f"last ended as {state} ({reason}): mend what the log shows and submit again",
        )
    return make_outcome(run, job, "requeue", f"{state} ({reason}), newest checkpoint: step {step}")


def make_outcome(
    run: RunDirectory,
    job: str | None,
    decision: Literal["finished", "requeue", "stop"],
    reason: str,
) -> Outcome:
    """A decision with its circumstances."""
    return Outcome(
        decision=decision,
        reason=reason,
        step=newest_step(run),
        job=job,
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        time=time.time(),
    )


def read_end(run: RunDirectory, job: str | None) -> tuple[str, str]:
    """State and reason of the end; ranks that never came to write theirs died at the start."""
    status = run.read_status()
    if not status or status["job"] != job:
        return "crashed", "before the first step"
    state, reason = str(status["state"]), str(status["reason"])
    return ("crashed", f"at step {status['step']}") if state == "running" else (state, reason)


def newest_step(run: RunDirectory) -> int:
    """The step of the newest complete checkpoint, 0 without one."""
    found = list_checkpoints(run.checkpoints)
    return int(found[-1].name.removeprefix("step_")) if found else 0


def read_restarts(run: RunDirectory) -> list[dict[str, Any]]:
    """The ends of earlier lives, oldest first."""
    path = run.path / "restarts.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def count_fruitless(restarts: list[dict[str, Any]], step: int) -> int:
    """How many restarts in a row, up to now, began at `step` and did not get beyond it."""
    count = 0
    for restart in reversed(restarts):
        if restart["decision"] != "requeue" or restart["step"] != step:
            break
        count += 1
    return count


if __name__ == "__main__":
    run_command(main)
