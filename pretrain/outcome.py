"""Decides what a job script does after its ranks have ended: finished, requeue or stop.

The decision is on stdout and the reason on stderr. The command takes the configuration of the
ranks, reads their run directory, and adds a line to `restarts.jsonl` there.
"""

import os
import sys
import time
from pathlib import Path

from megatron_eso.command_line import CommandLine, add_layers
from megatron_eso.config.layers import SHIPPED_CONFIGS
from megatron_eso.config.loading import load_config
from megatron_eso.errors import run_command
from megatron_eso.runs.restarts import (
    Decision,
    Outcome,
    append_outcome,
    read_failure,
    read_outcomes,
    restart_count,
)
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.steps import newest, step_number

MAX_FRUITLESS_RESTARTS = 3


def main(argv: list[str] | None = None) -> None:
    """Print the decision.

    Raises:
        ConfigError: The configuration is wrong.
    """
    parser = CommandLine(prog="python -m pretrain.outcome", description=__doc__.split("\n\n")[0])
    add_layers(parser)
    parser.add_argument("--directory", action="store_true", help="print the run directory instead")
    arguments = parser.parse_intermixed_args(argv)
    run = RunDirectory(
        Path(load_config(arguments.layers, folder=SHIPPED_CONFIGS).config.run.directory)
    )
    if arguments.directory:
        sys.stdout.write(f"{run.path}\n")
        return
    outcome = judge(run, job=os.environ.get("SLURM_JOB_ID"))
    append_outcome(run.restarts, outcome)
    sys.stderr.write(f"{outcome.decision}: {outcome.reason}\n")
    sys.stdout.write(f"{outcome.decision}\n")


def judge(run: RunDirectory, job: str | None) -> Outcome:
    """Decide how `run` continues after the ranks of `job` have ended.

    Launchers hide exit codes. The decision therefore follows from `failure.json` and `status.json`,
    and from whether a checkpoint is newer than those of the earlier restarts. The chain of jobs
    stops if another process holds the run. A process of `job` itself does not stop it: the lock of
    a lost node may outlive that node.

    Raises:
        ConfigError: `status.json`, `failure.json` or `restarts.jsonl` cannot be read.
    """
    with run.try_lock() as lock:
        is_free = lock.is_held or run.is_held_by_job(lock, job)
    if not is_free:
        return make_outcome(run, job, "stop", run.describe_refusal(lock))
    failure = read_failure(run.failure, job)
    if failure is not None:
        reason = f"failed ({failure}): correct that and submit again"
        return make_outcome(run, job, "stop", reason)
    state, reason = read_end(run, job)
    step = newest_step(run)
    if state == "finished":
        return make_outcome(run, job, "finished", reason)
    if run.stop_file.exists():
        reason = f"the file {run.stop_file} exists: submit again to continue"
        return make_outcome(run, job, "stop", reason)
    if count_fruitless(read_outcomes(run.restarts), step) >= MAX_FRUITLESS_RESTARTS:
        return make_outcome(
            run,
            job,
            "stop",
            f"{MAX_FRUITLESS_RESTARTS} restarts in a row made no checkpoint after step {step}; the "
            f"last ended as {state} ({reason}): correct what the log shows and submit again",
        )
    return make_outcome(run, job, "requeue", f"{state} ({reason}), newest checkpoint: step {step}")


def make_outcome(
    run: RunDirectory,
    job: str | None,
    decision: Decision,
    reason: str,
) -> Outcome:
    """Return a decision with step, job and time."""
    return Outcome(
        decision=decision,
        reason=reason,
        step=newest_step(run),
        job=job,
        restart=restart_count(),
        time=time.time(),
    )


def read_end(run: RunDirectory, job: str | None) -> tuple[str, str]:
    """Return state and reason of the end; ranks without a status have died at the start."""
    status = run.read_status()
    if status is None or status.job != job:
        return "crashed", "before the first step"
    if status.state == "running":
        return "crashed", f"at step {status.step}"
    return status.state, status.reason


def newest_step(run: RunDirectory) -> int:
    """Return the step of the newest complete checkpoint, 0 without one."""
    checkpoint = newest(run.checkpoints)
    return 0 if checkpoint is None else step_number(checkpoint)


def count_fruitless(outcomes: list[Outcome], step: int) -> int:
    """Count the latest restarts in a row that began at `step` and saved no later one."""
    count = 0
    for outcome in reversed(outcomes):
        if outcome.decision != "requeue" or outcome.step != step:
            break
        count += 1
    return count


if __name__ == "__main__":
    run_command(main)
