"""Writing, checking and reading a checkpoint's files, each rank its own share of them.

The folder is Megatron-Core's `torch_dist` format. Nothing here touches the state of the run, so
that writing may go on in a thread, on a gloo group of its own, while the run takes steps.
"""

import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_eso.errors import CheckpointError
from megatron_eso.files import sync_tree, write_json
from megatron_eso.runs.file_index import (
    FileEntry,
    Index,
    describe_file,
    find_damage,
    read_index,
    write_index,
)
from megatron_eso.runs.unpickling import TORCH_DIST_BACKEND, read_checkpoint_metadata
from megatron_eso.training.checkpointing.pieces import Piece, PieceReader, PieceWriter

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong on a rank, to be told to the others."""

    reason: str


class SafeReader(FileSystemReader):
    """torch's reader, which does not execute what the pickle of an index says."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """The index."""
        return read_checkpoint_metadata(Path(self.path))


class PlainWriter(FileSystemWriter):
    """torch's writer, which tells what the file system said and not what came of it."""

    def __init__(self, folder: Path) -> None:
        # Nothing is copied ahead from a GPU: a thread's current one is not this rank's.
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's pieces.

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
    pieces: list[Piece],
    documents: dict[str, dict[str, Any]],
    group: dist.ProcessGroup,
) -> None:
    """Fill an empty folder; all on disk when this returns. Collective over `group`.

    Args:
        folder: The same on every rank.
        pieces: This rank's.
        documents: JSON files to write beside them, by name; rank 0's count.
        group: Of all ranks, gloo.

    Raises:
        CheckpointError: The file system refuses, on any rank.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        try:
            save_state_dict(
                {},
                storage_writer=PlainWriter(folder),
                planner=PieceWriter(pieces),
                process_group=group,
            )
        except CheckpointException as error:
            raise CheckpointError(f"{folder}: {_tell_cause(error)}") from error
    described = _attempt(
        lambda: {path.name: describe_file(path) for path in folder.glob(f"__{group.rank()}_*")}
    )
    gathered: list[Index | Failure] = [{}] * group.size()
    dist.all_gather_object(gathered, described, group=group)

    def finish() -> None:
        torch.save({}, folder / "common.pt")
        write_json(folder / "metadata.json", TORCH_DIST_BACKEND)
        for name, content in documents.items():
            write_json(folder / name, content)
        index: dict[str, FileEntry] = {}
        for part in gathered:
            if isinstance(part, Failure):
                raise OSError(part.reason)
            index |= part
        for name in (".metadata", "common.pt", "metadata.json", *documents):
            index[name] = describe_file(folder / name)
        write_index(folder, index)
        sync_tree(folder)

    run_on_first(group, finish)


def run_on_first(group: dist.ProcessGroup, action: Callable[[], Answer]) -> Answer:
    """Have rank 0 act while the others wait, and tell them what it got. Collective over `group`.

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
    """Do something that the other ranks must hear of, however it ends."""
    try:
        return action()
    except Exception as error:
        if not isinstance(error, OSError | CheckpointError):
            logger.exception("unexpected")  # with its traceback, which the others do not see
        return Failure(str(error) or repr(error))


def find_damaged_files(folder: Path, group: dist.ProcessGroup | None = None) -> list[str]:
    """What is wrong with a checkpoint, a line each, the same on every rank.

    Collective over `group`, or the world: the ranks share the files.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    problems: list[str] = []
    try:
        index = read_index(folder)
        problems += find_damage(folder, index, sorted(index)[rank::size])
    except CheckpointError as error:
        problems.append(str(error))
    gathered: list[list[str]] = [[]] * size
    dist.all_gather_object(gathered, problems, group=group)
    return sorted({problem for part in gathered for problem in part})


def read_pieces(folder: Path, pieces: list[Piece]) -> None:
    """Fill this rank's pieces from a checkpoint of any layout; no communication.

    Raises:
        CheckpointError: A tensor is missing or of another shape, or a file cannot be read.
    """
    planner = PieceReader(pieces)
    try:
        load_state_dict({}, storage_reader=SafeReader(folder), planner=planner, no_dist=True)
    except (CheckpointException, OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise CheckpointError(
            f"{folder}: cannot be read ({_tell_cause(error)}); it was written by torch "
            f"{written_by(folder)}, this is {torch.__version__}"
        ) from error


def written_by(folder: Path) -> str:
    """Version of torch that wrote a checkpoint."""
    try:
        state = json.loads((folder / "state.json").read_text())
        return str(state["torch_version"])
    except (OSError, ValueError, KeyError, TypeError):
        return "of an unknown version"


def _tell_cause(error: BaseException) -> str:
    """What went wrong on the first rank that a CheckpointException tells of."""
    failures = getattr(error, "failures", {})
    return str(next(iter(failures.values()))[0]) if failures else str(error)
