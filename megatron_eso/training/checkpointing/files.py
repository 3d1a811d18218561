"""Writing, checking and reading a checkpoint's files, each rank its own share of them.

The folder is Megatron-Core's `torch_dist` format. Nothing here touches the state of the run, so
that a thread can write, on a gloo group of its own, while the run takes steps.
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
from megatron_eso.runs.torch_dist import READ_ERRORS, SafeReader, write_backend
from megatron_eso.runs.unpickling import METADATA_FILE
from megatron_eso.training.checkpointing.tensor_parts import PartReader, PartWriter, TensorPart

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong on a rank, in a form that the other ranks can receive."""

    reason: str


class PlainWriter(FileSystemWriter):
    """torch's writer, which raises the error of the file system and not one that followed it."""

    def __init__(self, folder: Path) -> None:
        # Nothing is copied ahead from a GPU: a thread's current one is not this rank's.
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's parts.

        Raises:
            OSError: The file system refuses.
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
    """Fill an empty folder; all on disk when this returns. Collective over `group`.

    Args:
        folder: The same on every rank.
        parts: This rank's.
        documents: Content of the JSON files by name; those of rank 0 are written.
        group: Of all ranks, gloo.
        check: Refuses what this rank has written, by a CheckpointError; called after the writing.

    Raises:
        CheckpointError: The file system or a check refuses, on any rank.
    """
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

    def finish_own() -> Index:
        check()
        return {path.name: describe_file(path) for path in folder.glob(f"__{group.rank()}_*")}

    gathered: list[Index | Failure] = [{}] * group.size()
    dist.all_gather_object(gathered, _attempt(finish_own), group=group)

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
    """Have rank 0 act while the others wait, and return its result on all. Collective over `group`.

    Raises:
        CheckpointError: On every rank, where the file system refused rank 0.
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
    """Act, and return any error in a form that the other ranks can receive."""
    try:
        return action()
    except Exception as error:
        if not isinstance(error, OSError | CheckpointError):
            logger.exception("unexpected")  # with its traceback, which other ranks lack
        return Failure(str(error) or repr(error))


def find_damaged_files(folder: Path, group: dist.ProcessGroup | None = None) -> list[str]:
    """Find what is wrong with a checkpoint, a line each, the same on every rank.

    Collective over `group`, or the world: the ranks share the files.
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
    """Fill this rank's parts from a checkpoint of any layout; no communication.

    Raises:
        CheckpointError: A tensor is missing or of another shape, or a file cannot be read.
    """
    planner = PartReader(parts)
    try:
        load_state_dict({}, storage_reader=SafeReader(folder), planner=planner, no_dist=True)
    except READ_ERRORS as error:
        raise CheckpointError(
            f"{folder}: cannot be read ({_find_cause(error)}); it was written by torch "
            f"{_find_writer(folder)}, this is {torch.__version__}"
        ) from error


def _find_writer(folder: Path) -> str:
    """Return the version of torch that wrote a checkpoint."""
    try:
        return read_checkpoint_state(folder).torch_version or "of an unknown version"
    except CheckpointError:
        return "of an unknown version"


def _find_cause(error: BaseException) -> str:
    """Return what went wrong on the first rank that a CheckpointException names."""
    failures = getattr(error, "failures", {})
    return str(next(iter(failures.values()))[0]) if failures else str(error)
