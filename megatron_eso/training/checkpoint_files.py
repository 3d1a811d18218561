"""Writing, checking and reading a checkpoint's files, each rank its own share of them.

The folder is Megatron-Core's `torch_dist` format. Nothing here touches the state of the run, so
that writing may go on in a thread, on a gloo group of its own, while the run takes steps.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from megatron_eso.errors import CheckpointError
from megatron_eso.file_index import (
    FileEntry,
    Index,
    describe_file,
    find_damage,
    read_index,
    write_index,
)
from megatron_eso.files import sync_tree, write_json
from megatron_eso.safe_pickle import TORCH_DIST_BACKEND, read_checkpoint_metadata
from megatron_eso.training.checkpoint_pieces import Piece, PieceReader, PieceWriter


class SafeReader(FileSystemReader):
    """torch's reader, which does not execute what the pickle of an index says."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """The index."""
        return read_checkpoint_metadata(Path(self.path))


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
                storage_writer=FileSystemWriter(folder, sync_files=True),
                planner=PieceWriter(pieces),
                process_group=group,
            )
        except CheckpointException as error:
            raise CheckpointError(f"{folder}: {_tell_cause(error)}") from error
    described = _describe_files(folder, group.rank())
    gathered: list[Index | str] = [{}] * group.size()
    dist.all_gather_object(gathered, described, group=group)

    def finish() -> None:
        torch.save({}, folder / "common.pt")
        write_json(folder / "metadata.json", TORCH_DIST_BACKEND)
        for name, content in documents.items():
            write_json(folder / name, content)
        index: dict[str, FileEntry] = {}
        for part in gathered:
            if isinstance(part, str):
                raise OSError(part)
            index |= part
        for name in (".metadata", "common.pt", "metadata.json", *documents):
            index[name] = describe_file(folder / name)
        write_index(folder, index)
        sync_tree(folder)

    run_on_first(group, finish)


def run_on_first(group: dist.ProcessGroup, action: Callable[[], None]) -> None:
    """Have rank 0 act while the others wait. Collective over `group`.

    Raises:
        CheckpointError: On every rank, where the file system refused rank 0.
    """
    failure: list[str | None] = [None]
    if group.rank() == 0:
        try:
            action()
        except OSError as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure, group=group, group_src=0)
    if failure[0] is not None:
        raise CheckpointError(failure[0])


def _describe_files(folder: Path, rank: int) -> Index | str:
    """The files that a rank has written, or what the file system said."""
    try:
        return {path.name: describe_file(path) for path in folder.glob(f"__{rank}_*.distcp")}
    except OSError as error:
        return str(error)


def find_damaged_files(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, a line each, the same on every rank.

    Collective over the world: the ranks share the files. Tensors go over the default group's
    device, so this comes after the process group is there.
    """
    problems: list[str] = []
    try:
        index = read_index(folder)
        names = sorted(index)[dist.get_rank() :: dist.get_world_size()]
        problems += find_damage(folder, index, names)
    except CheckpointError as error:
        problems.append(str(error))
    gathered: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, problems)
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
