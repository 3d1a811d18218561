"""Writes, checks and reads the files of a checkpoint; each rank handles its share of them.

A folder has Megatron-Core's format `torch_dist`. No function here uses the state of the run, so a
thread can write through its own gloo group while the run takes steps.
"""

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_eso.errors import CheckpointError
from megatron_eso.files import sync_tree, write_json
from megatron_eso.runs.checkpoint_state import read_checkpoint_state
from megatron_eso.runs.file_index import (
    FileEntry,
    Index,
    describe_file,
    find_damage,
    read_file_index,
    write_file_index,
)
from megatron_eso.runs.torch_dist import READ_ERRORS, write_backend
from megatron_eso.runs.unpickling import METADATA_FILE
from megatron_eso.training.checkpointing.planners import PartReader, PartWriter
from megatron_eso.training.checkpointing.stored_ranges import RangeReader
from megatron_eso.training.optimization.tensor_parts import TensorPart

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Failure:
    """The reason why a rank failed, in a form that is sent to the other ranks."""

    reason: str


class PlainWriter(FileSystemWriter):
    """torch's writer, which raises the first error of the file system and no later one."""

    def __init__(self, folder: Path) -> None:
        # torch would copy ahead on the thread's current GPU, which may be another rank's.
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's parts.

        Raises:
            OSError: The file system reports an error.
        """
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def write_files(
    folder: Path,
    parts: list[TensorPart],
    documents: Mapping[str, dict[str, Any]],
    group: dist.ProcessGroup,
    check: Callable[[], None],
) -> None:
    """Write a checkpoint into an empty folder and sync it to disk; collective over `group`.

    Args:
        folder: The same path on every rank.
        parts: This rank's parts.
        documents: The content of the JSON files by name; rank 0 writes its own.
        group: A gloo group of all ranks.
        check: Called after this rank's parts are written; raises CheckpointError if they are wrong.

    Raises:
        CheckpointError: The file system or a check reports an error on any rank.
    """
    # Every rank writes its own tensors.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        try:
            save_state_dict(
                {},
                storage_writer=PlainWriter(folder),
                planner=PartWriter(parts),
                process_group=group,
            )
        except CheckpointException as error:
            raise CheckpointError(f"{folder}: {_find_cause(error)}") from error

    # Every rank hashes its own files, and rank 0 collects the hashes.
    def finish_own() -> Index:
        check()
        return {path.name: describe_file(path) for path in folder.glob(f"__{group.rank()}_*")}

    gathered: list[Index | Failure] = [{}] * group.size()
    dist.all_gather_object(gathered, _attempt(finish_own), group=group)

    # Rank 0 writes the small files and the index of all hashes.
    def finish() -> None:
        small_files = write_backend(folder, indent=1)
        for name, content in documents.items():
            write_json(folder / name, content)
        index: dict[str, FileEntry] = {}
        for part in gathered:
            if isinstance(part, Failure):
                raise OSError(part.reason)
            index |= part
        for name in (METADATA_FILE, *small_files, *documents):
            index[name] = describe_file(folder / name)
        write_file_index(folder, index)
        sync_tree(folder)

    run_on_first(group, finish)


def run_on_first(group: dist.ProcessGroup, action: Callable[[], Answer]) -> Answer:
    """Call `action` on rank 0 and return its result on all ranks; collective over `group`.

    Raises:
        CheckpointError: On every rank, if the action failed on rank 0.
    """
    answer: list[Any] = [None]
    if group.rank() == 0:
        answer = [_attempt(action)]
    dist.broadcast_object_list(answer, group=group, group_src=0)
    if isinstance(answer[0], Failure):
        raise CheckpointError(answer[0].reason)
    result: Answer = answer[0]
    return result


def _attempt(action: Callable[[], Answer]) -> Answer | Failure:
    """Call `action`, and return an error in a form that is sent to the other ranks."""
    try:
        return action()
    except Exception as error:
        if not isinstance(error, OSError | CheckpointError):
            logger.exception("unexpected")  # the other ranks receive no traceback
        return Failure(str(error) or repr(error))


def find_damaged_files(folder: Path, group: dist.ProcessGroup | None = None) -> list[str]:
    """Compare a checkpoint's files with its index of hashes; the ranks share the work.

    Collective over `group`, or over the world without one.

    Returns:
        One line for each damaged file, equal on all ranks.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    problems: list[str] = []
    try:
        index = read_file_index(folder)
        problems += find_damage(folder, index, sorted(index)[rank::size])
    except CheckpointError as error:
        problems.append(str(error))
    gathered: list[list[str]] = [[]] * size
    dist.all_gather_object(gathered, problems, group=group)
    return sorted({problem for part in gathered for problem in part})


def read_parts(folder: Path, parts: list[TensorPart]) -> None:
    """Fill this rank's parts from a checkpoint of any layout; collective over the world.

    Raises:
        CheckpointError: On every rank, if on any a tensor is missing or has another shape, or a
            file cannot be read.
    """

    def read_own() -> None:
        try:
            load_state_dict(
                {}, storage_reader=RangeReader(folder), planner=PartReader(parts), no_dist=True
            )
        except READ_ERRORS as error:
            raise CheckpointError(
                f"{folder}: cannot be read ({_find_cause(error)}); it was written by torch "
                f"{_find_writer(folder)}, this is {torch.__version__}"
            ) from error

    answers: list[Failure | None] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, _attempt(read_own))
    for answer in answers:
        if isinstance(answer, Failure):
            raise CheckpointError(answer.reason)


def _find_writer(folder: Path) -> str:
    """Return the version of torch that a checkpoint was written with."""
    try:
        return read_checkpoint_state(folder).torch_version or "of an unknown version"
    except CheckpointError:
        return "of an unknown version"


def _find_cause(error: BaseException) -> str:
    """Return the error of the first rank that a CheckpointException names."""
    failures = getattr(error, "failures", {})
    return str(next(iter(failures.values()))[0]) if failures else str(error)
