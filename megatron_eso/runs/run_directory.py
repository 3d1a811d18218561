"""The run directory: the paths of its files, and the lock that one process holds."""

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_eso.config.loading import config_to_dict
from megatron_eso.config.sections import Config
from megatron_eso.errors import ConfigError
from megatron_eso.files import new_folder, write_json
from megatron_eso.locks import (
    Lock,
    NoLocksError,
    hold_file,
    hold_lock,
    parse_holder,
    this_process,
)
from megatron_eso.runs.status import JobFacts, RunStatus, State, read_status, write_status

CONFIG_FILE = "config.json"
LOST_NODE_SECONDS = 300
"""How long a requeued job waits until the file server releases the lock of its lost node."""
_POLL_SECONDS = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """A run directory.

    Attributes:
        path: Path of the directory.
        facts: Facts of the job, which every written status states.
    """

    path: Path
    facts: JobFacts = field(default_factory=JobFacts)

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / CONFIG_FILE

    @property
    def tokenizer(self) -> Path:
        """A copy of the tokenizer of the run's data."""
        return self.path / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        """One folder for each kept checkpoint, and `latest`."""
        return self.path / "checkpoints"

    @property
    def initial(self) -> Path:
        """A run directory with the weights of the sampler directory that the run starts from."""
        return self.path / "init_from"

    @property
    def holder_file(self) -> Path:
        """The process that holds the directory, on a file system without `flock`."""
        return self.path / ".holder"

    @property
    def status(self) -> Path:
        """The status of the run (status.py)."""
        return self.path / "status.json"

    @property
    def restarts(self) -> Path:
        """The ends of the run's jobs (restarts.py)."""
        return self.path / "restarts.jsonl"

    @property
    def failure(self) -> Path:
        """What the user of the last job has to correct (restarts.py)."""
        return self.path / "failure.json"

    @property
    def logs(self) -> Path:
        """One log for each rank."""
        return self.path / "logs"

    def log_of_rank(self, rank: int) -> Path:
        """Return the log of a rank."""
        return self.logs / f"rank_{rank:05d}.log"

    @property
    def stop_file(self) -> Path:
        """When this file appears, the run saves and ends; it is not requeued."""
        return self.path / "stop"

    @property
    def requeue_file(self) -> Path:
        """When this file appears, the job saves and ends; the job script starts another one."""
        return self.path / "requeue"

    @property
    def metrics(self) -> Path:
        """The curves, one JSON object in each line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @contextmanager
    def try_lock(self) -> Iterator[Lock]:
        """Try to hold the directory for this process while the body runs.

        On a file system without `flock`, a file that names this process takes its place.

        Yields:
            Whether this process holds the directory, and who holds it otherwise.

        Raises:
            UserError: The lock fails for a reason other than a file system without `flock`.
        """
        with ExitStack() as stack:
            try:
                lock = stack.enter_context(
                    hold_lock(self.path / ".lock", holder=this_process().to_json())
                )
            except NoLocksError as error:
                lock = stack.enter_context(hold_file(self.holder_file))
                if lock.is_held:
                    logger.warning("%s; %s is used instead", error, self.holder_file)
            yield lock

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process, at most until the process ends.

        A lock of this Slurm job is waited for, because the lock of a lost node may outlive it.

        Raises:
            ConfigError: Another process holds the directory; the error names its host and job.
            UserError: The lock fails for a reason other than a file system without `flock`.
        """
        deadline = None
        with ExitStack() as stack:
            lock = stack.enter_context(self.try_lock())
            while self.is_held_by_job(lock, this_process().job):
                if deadline is None:
                    deadline = time.monotonic() + LOST_NODE_SECONDS
                    logger.warning(
                        "%s; waiting up to %d s, because this job may have lost that node",
                        self.describe_refusal(lock),
                        LOST_NODE_SECONDS,
                    )
                if time.monotonic() >= deadline:
                    break
                stack.close()
                time.sleep(_POLL_SECONDS)
                lock = stack.enter_context(self.try_lock())
            if not lock.is_held:
                raise ConfigError(self.describe_refusal(lock))
            yield

    @staticmethod
    def is_held_by_job(lock: Lock, job: str | None) -> bool:
        """Return whether a process of a Slurm job holds the lock, but not this process."""
        holder = parse_holder(lock.holder)
        return not lock.is_held and holder is not None and job is not None and holder.job == job

    def describe_refusal(self, lock: Lock) -> str:
        """Return one line: who holds the directory, and what the user can do."""
        line = (
            f"run.directory = {self.path}: {parse_holder(lock.holder) or 'another process'} is "
            "running there: wait for it, or choose another run.directory"
        )
        if self.holder_file.exists():
            line += f"; if it has ended, remove {self.holder_file}"
        return line

    def write_config(self, config: Config, tokenizer: Path) -> None:
        """Record the resolved configuration and the tokenizer of its data."""
        write_json(self.config, config_to_dict(config))
        if not self.tokenizer.exists():
            with new_folder(self.tokenizer) as partial:
                shutil.copytree(tokenizer, partial, dirs_exist_ok=True)

    def write_status(
        self,
        state: State,
        step: int,
        reason: str = "",
        *,
        loss: float | None = None,
        tokens_per_second: float | None = None,
        seconds_left: float | None = None,
    ) -> None:
        """Replace `status.json`; an error of the file system is logged and does not end the run.

        Args:
            state: State of the run.
            step: Steps that the run has taken.
            reason: Why the run has ended, in one line.
            loss: Loss of the last step.
            tokens_per_second: Speed of the last step.
            seconds_left: Expected seconds until the last step.
        """
        status = RunStatus(
            state=state,
            step=step,
            reason=reason,
            loss=loss,
            tokens_per_second=tokens_per_second,
            seconds_left=seconds_left,
            **asdict(self.facts),
        )
        try:
            write_status(self.status, status)
        except OSError as error:
            logger.error("%s: cannot be written: %s", self.status, error)

    def read_status(self) -> RunStatus | None:
        """Read `status.json`; return None where it is missing.

        Raises:
            ConfigError: The file cannot be read, or has another format version.
        """
        return read_status(self.status)
