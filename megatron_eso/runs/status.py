"""The status of a run: `status.json`, and the newest values in `metrics.jsonl`."""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from megatron_eso.errors import ConfigError
from megatron_eso.files import write_json

FORMAT_VERSION = 1
_TAIL_BYTES = 64 * 1024

State = Literal["running", "interrupted", "finished", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFacts:
    """The facts that every status of a job states; None for an unknown one."""

    restarts: int | None = None
    """Jobs of this run before this one."""
    num_steps: int | None = None
    num_ranks: int | None = None
    hosts: list[str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus(JobFacts):
    """The status of a run. By default host, process, job and time are those of the caller."""

    state: State
    step: int
    reason: str = ""
    """Why the run has ended."""
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    job: str | None = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID"))
    """Slurm's number of the job; None outside Slurm."""
    time: float = field(default_factory=time.time)
    """Time of the status, in seconds since 1970."""
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    """Expected seconds until the last step, at the speed so far."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of `status.json`, without unknown facts."""
        values = asdict(self)
        stated = {
            name: values[name] for name in _ORDER if name in _ALWAYS or values[name] is not None
        }
        return {"format_version": FORMAT_VERSION, **stated}


_ALWAYS = ("state", "step", "reason", "host", "pid", "job", "time")
_ORDER = (
    *_ALWAYS,
    *(each.name for each in fields(JobFacts)),
    *("loss", "tokens_per_second", "seconds_left"),
)


def write_status(path: Path, status: RunStatus) -> None:
    """Replace `status.json`; it is on disk when this returns.

    Raises:
        OSError: The file system refuses.
    """
    write_json(path, status.to_json())


def read_status(path: Path) -> RunStatus | None:
    """Read `status.json`; return None where it is missing.

    Raises:
        ConfigError: The file cannot be read, or has another format version.
    """
    try:
        content = json.loads(path.read_text())
        version = content["format_version"]
        if version == FORMAT_VERSION:
            missing = [name for name in _ALWAYS if name not in content]
            if missing:
                raise ValueError(f"it states no {missing[0]}")
            return RunStatus(**{name: content[name] for name in _ORDER if name in content})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); remove it") from error
    raise ConfigError(
        f"{path}: format_version {version}, this version reads {FORMAT_VERSION}: "
        f"use the megatron-eso that wrote it"
    )


def read_recent_metrics(path: Path) -> dict[str, float]:
    """Read the newest value of each tag in the last 64 KiB; empty for a missing file.

    Steps and validations write separate lines, so no line has all tags.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return {}
    values: dict[str, float] = {}
    for line in lines:
        try:
            # Values that are not finite are written as text.
            values |= {key: float(value) for key, value in json.loads(line).items()}
        except (ValueError, TypeError, AttributeError):  # a line that is cut, or is being written
            continue
    return values
