"""A run's directory: who holds it, what it was configured to do, and how it fares."""

import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_eso.config.loading import config_to_dict
from megatron_eso.config.sections import Config
from megatron_eso.errors import ConfigError
from megatron_eso.files import write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of a run.

    Attributes:
        path: The directory.
        facts: Of this job, said in every status: restarts, num_steps, hosts, num_ranks.
    """

    path: Path
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        """One folder for each kept checkpoint, and `latest`."""
        return self.path / "checkpoints"

    @property
    def initial(self) -> Path:
        """A run directory with the weights of the sampler directory that the run starts from."""
        return self.path / "init_from"

    @property
    def stop_file(self) -> Path:
        """Whoever makes it ends the run, after a checkpoint; it is not requeued."""
        return self.path / "stop"

    @property
    def requeue_file(self) -> Path:
        """Whoever makes it ends the job, after a checkpoint; the job script has another go on."""
        return self.path / "requeue"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process; the operating system lets go when the process ends.

        Raises:
            ConfigError: Another process holds it; the message tells host and job.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                raise ConfigError(
                    f"run.directory = {self.path}: {lock.read().strip() or 'another process'} "
                    f"is running there: wait for it, or choose another run.directory"
                ) from error
            lock.truncate(0)
            lock.write(describe_process())
            lock.flush()
            yield

    def write_config(self, config: Config, tokenizer: Path) -> None:
        """Record the resolved configuration, and the tokenizer that its data were made with."""
        write_json(self.path / "config.json", config_to_dict(config))
        if not (self.path / "tokenizer").exists():
            partial = self.path / "tokenizer.tmp"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(tokenizer, partial)
            partial.replace(self.path / "tokenizer")

    def write_status(self, state: str, step: int, reason: str = "", **more: Any) -> None:
        """Replace `status.json`; `state` is running, interrupted, finished or failed.

        A file system that refuses does not end the run; the log tells.
        """
        content = {
            "format_version": 1,
            "state": state,
            "step": step,
            "reason": reason,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "time": time.time(),
            **self.facts,
            **more,
        }
        try:
            write_json(self.path / "status.json", content)
        except OSError as error:
            logger.error("%s: not up to date: %s", self.path / "status.json", error)

    def read_status(self) -> dict[str, Any]:
        """Read `status.json`; empty where there is none."""
        try:
            return dict(json.loads((self.path / "status.json").read_text()))
        except FileNotFoundError:
            return {}


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `RUN_DIR/checkpoints`, oldest first.

    A checkpoint gets its name `step_XXXXXXXX` once it is complete.
    """
    return sorted(folder.glob("step_" + "[0-9]" * 8))


def describe_process() -> str:
    """Host, process and job, for whoever finds the directory locked."""
    job = os.environ.get("SLURM_JOB_ID")
    suffix = f" of job {job}" if job else ""
    return f"process {os.getpid()} on {socket.gethostname()}{suffix}"
