"""The ends of a run's jobs: how each job ended, and what the job script decided.

`restarts.jsonl` has a line for each job. `failure.json` holds the error that the user of a job has
to correct; any rank of the job may write it.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_eso.errors import ConfigError, OutageError, UserError
from megatron_eso.files import write_json, write_text

Decision = Literal["finished", "requeue", "stop"]

FAILURE_VERSION = 1
"""`format_version` of `failure.json`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The end of one job of a run.

    Attributes:
        decision: What the job script does next.
        reason: The reason for the decision, in one line.
        step: Step of the newest complete checkpoint; 0 without one.
        job: Slurm's number of the job; None outside Slurm.
        restart: How many times Slurm had started the job before.
        time: Time of the end, in seconds since 1970.
    """

    decision: Decision
    reason: str
    step: int
    job: str | None
    restart: int
    time: float


def read_outcomes(path: Path) -> list[Outcome]:
    """Read the ends of earlier jobs, oldest first; a missing file has none.

    Raises:
        ConfigError: A line cannot be read.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    outcomes = []
    for number, line in enumerate(lines, start=1):
        try:
            outcomes.append(Outcome(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{path}: line {number} cannot be read ({error}); remove it"
            ) from error
    return outcomes


def append_outcome(path: Path, outcome: Outcome) -> None:
    """Add a line; it is on disk when this returns."""
    outcomes = [*read_outcomes(path), outcome]
    write_text(path, "".join(json.dumps(asdict(each)) + "\n" for each in outcomes))


def restart_count() -> int:
    """Return how many times Slurm has started this job before."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def write_failure(path: Path, error: UserError) -> None:
    """Record what the user of this Slurm job has to correct; any rank may call this.

    Nothing is written outside Slurm, because no job script would read it, nor about an outage of
    remote storage, after which the job script requeues the job.

    Args:
        path: The file to write.
        error: The error that ends the job.

    Raises:
        OSError: The file system refuses.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None and not isinstance(error, OutageError):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"job": job, "restart": restart_count(), "reason": str(error)}
        write_json(path, {"format_version": FAILURE_VERSION, **content})


def read_failure(path: Path, job: str | None) -> str | None:
    """Return what the user of a job has to correct; None where its ranks recorded nothing.

    Args:
        path: The file to read.
        job: Slurm's number of the job.

    Raises:
        ConfigError: The file cannot be read, or has another format version.
    """
    try:
        content = json.loads(path.read_text())
        if content["format_version"] != FAILURE_VERSION:
            raise ValueError(f"format_version {content['format_version']}, not {FAILURE_VERSION}")
        is_of_job = (content["job"], content["restart"]) == (job, restart_count())
        return str(content["reason"]) if is_of_job else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); remove it") from error
