"""Ends the process of a rank that has failed, without waiting for the other ranks.

From torch 2.6 on, the destruction of a NCCL process group waits for its collectives. After the
failure of a rank they never end: https://github.com/pytorch/pytorch/issues/132696
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

from megatron_eso.errors import UserError
from megatron_eso.ranks import own_rank

REPORT_SECONDS = 30.0
"""Limit for a report that blocks, for instance in a file system that hangs."""
_STORE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The failure of this rank, and the first one of the job.

    Attributes:
        is_first: Whether no other rank has failed before.
        first_line: The error of the rank that failed first, in a line.
        text: The error of this rank, with its traceback if the user cannot correct it.
    """

    is_first: bool
    first_line: str
    text: str


def report_failure(error: BaseException) -> Failure:
    """Report on stderr why the job fails, and limit the time until this process ends.

    Only the rank that fails first reports its error: most later ones are consequences. Call
    `end_process` afterwards.
    """
    faulthandler.dump_traceback_later(REPORT_SECONDS, exit=True)
    line = describe_error(error)
    is_first, first_line = _claim_report(line)
    trace = "" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
    failure = Failure(is_first=is_first, first_line=first_line, text=f"{trace}error: {line}\n")
    if is_first:
        sys.stderr.write(failure.text)
        sys.stderr.flush()
    return failure


def end_process(error: BaseException) -> NoReturn:
    """End this process at once, with the exit code of its error; process groups stay as they are.

    Args:
        error: The error of this rank, which was reported.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.exit_code if isinstance(error, UserError) else 1)


def describe_error(error: BaseException) -> str:
    """Return an error as a line, with rank and host if it is not one that the user can correct."""
    if isinstance(error, UserError):
        return str(error)
    text = " ".join(str(error).split())
    return f"rank {own_rank()} on {socket.gethostname()}: {type(error).__name__}: {text}"


def _claim_report(line: str) -> tuple[bool, str]:
    """Return whether this rank fails first, and the line of the rank that does.

    A store that does not answer has ended with its rank, which has reported its own failure.
    """
    if not dist.is_initialized():
        return True, line
    own, answers = json.dumps([own_rank(), line]), []

    def claim() -> None:
        with suppress(RuntimeError):
            store = PrefixStore("failure", _get_default_store())
            answers.append(store.compare_set("first", "", own).decode())

    # A thread, since a wait of another thread locks the store's connection.
    claiming = threading.Thread(target=claim, daemon=True)
    claiming.start()
    claiming.join(_STORE_SECONDS)
    first = next(iter(answers), None)
    return first == own, line if first is None else json.loads(first)[1]
