"""A job of two ranks of which one fails, and whose process groups cannot be destroyed.

The destruction of NCCL's groups waits for collectives, which never end after the failure of a rank.
Here it blocks without a GPU. `python -m tests.support.failing_ranks DATA FOLDER SECONDS [FAULT:RANK
...]` prints how the jobs end, as JSON lines; one that does not end within the seconds is killed.
"""

import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_eso.errors import ConfigError, DataError, run_command
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.training import job, loop
from megatron_eso.training.checkpointing import checkpoints
from megatron_eso.training.steps.batches import TrainingBatches
from pretrain import train
from pretrain.outcome import judge
from tests.support.training import Overrides, tiny_arguments

NUM_RANKS = 2
JOB = "17"
OVERRIDES: Overrides = {"train.num_steps": 3, "train.global_batch_size": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What a rank raises, and in which function.

    Attributes:
        owner: Has the function.
        name: Of the function.
        call: The number of the call that fails.
        error: What is raised.
    """

    owner: Any
    name: str
    call: int
    error: Exception


FAULTS: dict[str, Fault] = {
    "loader": Fault(
        owner=TrainingBatches,
        name="plan_step",
        call=2,
        error=DataError("shards/train: shard 3 is damaged"),
    ),
    "step": Fault(owner=loop, name="train_step", call=2, error=RuntimeError("a kernel failed")),
    "save": Fault(
        owner=checkpoints, name="write_files", call=1, error=RuntimeError("a save failed")
    ),
    "memory in a step": Fault(
        owner=loop, name="train_step", call=2, error=torch.OutOfMemoryError("CUDA out of memory")
    ),
    "memory at the start": Fault(
        owner=job,
        name="try_largest_batch",
        call=1,
        error=ConfigError("out of memory before step 1: lower train.micro_batch_size"),
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """How a job has ended.

    Attributes:
        codes: Exit code of each rank; None where it had to be killed.
        stderr: What each rank wrote there.
        seconds: From the fault to the end of the last rank.
    """

    codes: list[int | None]
    stderr: list[str]
    seconds: float


def run_failing(run: Path, data: Path, fault: str, rank: int, seconds: float) -> End:
    """Train on two ranks until one fails, and end the other as a launcher does, by SIGTERM.

    Args:
        run: The run directory.
        data: Of the fixture `tiny_data`.
        fault: A key of `FAULTS`.
        rank: The rank that fails.
        seconds: After which ranks are killed.
    """
    run.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    raised_at = context.Value("d", 0.0)
    arguments = tiny_arguments(run, data, OVERRIDES)
    ranks = [
        context.Process(
            target=run_rank,
            args=(arguments, each, port, run, FAULTS[fault] if each == rank else None, raised_at),
        )
        for each in range(NUM_RANKS)
    ]
    for process in ranks:
        process.start()
    codes = wait_for_all(ranks, seconds)
    ended_at = time.monotonic()
    return End(
        codes=codes,
        stderr=[(run / f"stderr_{each}").read_text() for each in range(NUM_RANKS)],
        seconds=ended_at - raised_at.value,
    )


def wait_for_all(ranks: list[BaseProcess], seconds: float) -> list[int | None]:
    """Wait for all ranks, of which the others are signalled when one has failed."""
    deadline = time.monotonic() + seconds
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if any(process.exitcode for process in ranks):
            for process in ranks:
                process.terminate()
        time.sleep(0.05)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return codes


def run_rank(
    arguments: list[str], rank: int, port: int, run: Path, fault: Fault | None, raised_at: Any
) -> None:
    """Run the training command on a rank, in a process that was forked for it."""
    with (run / f"stderr_{rank}").open("w") as stderr:
        os.dup2(stderr.fileno(), 2)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(NUM_RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "SLURM_JOB_ID": JOB,
    }
    torch.set_num_threads(1)
    forever = threading.Event()
    torch.distributed.destroy_process_group = lambda *_: forever.wait()
    if fault is not None:
        function = getattr(fault.owner, fault.name)
        failing = fail_at(function, fault.call, fault.error, raised_at)
        mock.patch.object(fault.owner, fault.name, failing).start()
    run_command(train.main, arguments)


def fail_at(
    function: Callable[..., Any], call: int, error: Exception, raised_at: Any
) -> Callable[..., Any]:
    """Return a function that raises at a call, and notes when."""
    num_calls = 0

    def count_and_call(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == call:
            raised_at.value = time.monotonic()
            raise error
        return function(*args, **kwargs)

    return count_and_call


def describe_end(run: Path, data: Path, fault: str, rank: int, seconds: float) -> dict[str, Any]:
    """Run a failing job, and describe how it ended and what is decided about its run."""
    end = run_failing(run, data, fault, rank, seconds)
    reported = [
        f"rank {each}: {line}"
        for each, text in enumerate(end.stderr)
        for line in text.splitlines()
        if line.startswith("error: ")
    ]
    outcome = judge(RunDirectory(run), JOB)
    return {
        "fault": fault,
        "rank": rank,
        "seconds": round(end.seconds, 1),
        "codes": end.codes,
        "reported": reported,
        "outcome": f"{outcome.decision}: {outcome.reason}",
    }


def main(data: str, folder: str, seconds: str, *jobs: str) -> None:
    """Print how jobs end, which are named `FAULT:RANK`; by default all."""
    os.environ["SLURM_JOB_ID"] = JOB
    for job_name in jobs or [f"{fault}:{rank}" for fault in FAULTS for rank in range(NUM_RANKS)]:
        fault, _, rank = job_name.partition(":")
        run = Path(folder) / f"{fault.replace(' ', '_')}_{rank}"
        end = describe_end(run, Path(data), fault, int(rank), float(seconds))
        print(json.dumps(end), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
