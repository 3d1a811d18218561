"""`restarts.jsonl`: how each job of a run has ended and what was decided then, a line each."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_eso.errors import ConfigError
from megatron_eso.files import write_text

Decision = Literal["finished", "requeue", "stop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The end of one job of a run.

    Attributes:
        decision: What the job script is to do.
        reason: Why, in a line.
        step: Of the newest complete checkpoint, 0 without one.
        job: Slurm's number of it, none outside Slurm.
        restart: How often Slurm had started this job before.
        time: In seconds since 1970.
    """

    decision: Decision
    reason: str
    step: int
    job: str | None
    restart: int
    time: float


def read_outcomes(path: Path) -> list[Outcome]:
    """Read the ends of earlier jobs, oldest first; none where there is no file.

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
    """Add a line; on disk when this returns."""
    outcomes = [*read_outcomes(path), outcome]
    write_text(path, "".join(json.dumps(asdict(each)) + "\n" for each in outcomes))
