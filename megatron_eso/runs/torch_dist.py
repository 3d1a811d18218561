"""Megatron-Core's `torch_dist` directories in plain PyTorch: no megatron, no process group.

torch reads the index `.metadata` with plain pickle; here only the classes of an index are built,
and tensors are read with `weights_only`. Byte entries (pickled objects) are never loaded.
"""

import dataclasses
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_eso.errors import CheckpointError
from megatron_eso.runs.unpickling import TORCH_DIST_BACKEND, read_checkpoint_metadata

INDEX_FILE = ".metadata"
BACKEND_FILE = "metadata.json"


class _Reader(FileSystemReader):
    """torch's reader with an index that was read already."""

    def __init__(self, directory: Path, index: Metadata) -> None:
        super().__init__(directory)
        self.index = index

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The index."""
        return self.index


def read_index(directory: Path) -> Metadata:
    """Read the index without executing anything that its pickle names.

    Raises:
        CheckpointError: missing, damaged or of another format.
    """
    backend = directory / BACKEND_FILE
    try:
        found = json.loads(backend.read_text(encoding="utf-8")).get("sharded_backend")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{backend}: cannot be read ({error}); give a complete checkpoint"
        ) from None
    if found != TORCH_DIST_BACKEND["sharded_backend"]:
        raise CheckpointError(f"{backend}: the format {found!r} is unknown; save as torch_dist")
    index = read_checkpoint_metadata(directory)
    if index.storage_meta is None:
        index = dataclasses.replace(index, storage_meta=StorageMeta())
    return index


def list_shapes(index: Metadata) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors by name."""
    return {
        key: tuple(entry.size)
        for key, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_tensors(directory: Path, index: Metadata, keys: Iterable[str]) -> dict[str, Tensor]:
    """Read tensors whole, in their stored dtype, whatever layout wrote them.

    Raises:
        CheckpointError: a tensor is not there, or a file is missing or damaged.
    """
    tensors = {}
    for key in keys:
        entry = index.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(
                f"{directory}: has no tensor {key}; the configuration is of another model"
            )
        tensors[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(tensors, storage_reader=_Reader(directory, index))
    # torch wraps whatever goes wrong in a rank's part in a CheckpointException.
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        EOFError,
        CheckpointException,
    ) as error:
        raise CheckpointError(
            f"{directory}: damaged, or written by a newer torch than {torch.__version__} "
            f"({type(error).__name__}: {error})"
        ) from None
    return tensors


def write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a directory that Megatron-Core 0.16.1's `dist_checkpointing.load` reads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save(dict(tensors), storage_writer=FileSystemWriter(directory, sync_files=True))
    torch.save({}, directory / "common.pt")
    (directory / BACKEND_FILE).write_text(json.dumps(TORCH_DIST_BACKEND), encoding="utf-8")
