"""Megatron-Core's `torch_dist` directories in plain PyTorch, without megatron or a process group.

torch reads `.metadata`, its index of the tensors, with plain pickle. Here, only the classes of an
index are created, and tensors are read with `weights_only`. Byte entries (pickled objects) are
never loaded.
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
from megatron_eso.runs.unpickling import METADATA_FILE, unpickle_metadata

BACKEND_FILE = "metadata.json"
COMMON_FILE = "common.pt"
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""The content of `metadata.json`, as Megatron-Core 0.16.1 reads it."""

READ_ERRORS = (OSError, RuntimeError, ValueError, KeyError, EOFError, CheckpointException)
"""Errors of torch for missing or damaged files; most are wrapped in a CheckpointException."""


class SafeReader(FileSystemReader):
    """A reader of torch that does not execute what the pickle of an index names.

    Args:
        directory: Directory of the checkpoint.
        metadata: The index of the tensors; None: it is read when needed.
    """

    def __init__(self, directory: Path, metadata: Metadata | None = None) -> None:
        super().__init__(directory)
        self._directory = directory
        self._metadata = metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return the index of the tensors.

        Raises:
            CheckpointError: The index is missing or damaged, or has another format.
        """
        return self._metadata or read_metadata(self._directory)


def is_torch_dist(directory: Path) -> bool:
    """Return whether the directory is a distributed checkpoint."""
    return (directory / BACKEND_FILE).is_file() and (directory / METADATA_FILE).is_file()


def read_metadata(directory: Path) -> Metadata:
    """Read the index of the tensors without executing anything that its pickle names.

    Raises:
        CheckpointError: The index is missing or damaged, or has another format.
    """
    backend = directory / BACKEND_FILE
    try:
        found = json.loads(backend.read_text(encoding="utf-8")).get("sharded_backend")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{backend}: cannot be read ({error}); give a complete checkpoint"
        ) from None
    if found != BACKEND["sharded_backend"]:
        raise CheckpointError(f"{backend}: the format {found!r} is unknown; save as torch_dist")
    metadata = unpickle_metadata(directory)
    if metadata.storage_meta is None:
        metadata = dataclasses.replace(metadata, storage_meta=StorageMeta())
    return metadata


def write_backend(directory: Path, *, indent: int | None = None) -> tuple[str, str]:
    """Write the two small files that Megatron-Core expects in a `torch_dist` directory.

    Args:
        directory: Directory of the checkpoint.
        indent: Indentation of the JSON text.

    Returns:
        The names of the files.
    """
    torch.save({}, directory / COMMON_FILE)
    end = "" if indent is None else "\n"
    text = json.dumps(BACKEND, indent=indent) + end
    (directory / BACKEND_FILE).write_text(text, encoding="utf-8")
    return COMMON_FILE, BACKEND_FILE


def list_shapes(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors by name."""
    return {
        key: tuple(entry.size)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_tensors(directory: Path, metadata: Metadata, keys: Iterable[str]) -> dict[str, Tensor]:
    """Read whole tensors in their stored dtype; any layout may have written them.

    Args:
        directory: Directory of the checkpoint.
        metadata: The index of the tensors.
        keys: Names of the tensors.

    Raises:
        CheckpointError: A tensor or a file is missing, or a file is damaged.
    """
    tensors = {}
    for key in keys:
        entry = metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(
                f"{directory}: has no tensor {key}; the configuration is of another model"
            )
        tensors[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(tensors, storage_reader=SafeReader(directory, metadata))
    except READ_ERRORS as error:
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
    write_backend(directory)
