"""Reading the index of a torch distributed checkpoint without executing what its pickle says.

torch reads `.metadata` with plain pickle, which runs any code that its writer put there.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_eso.errors import CheckpointError

ALLOWED = {
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}


class _IndexUnpickler(pickle.Unpickler):
    """Builds what an index is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class, or refuse."""
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def read_checkpoint_metadata(checkpoint: Path) -> Metadata:
    """Read the index of a distributed checkpoint.

    Raises:
        CheckpointError: It is missing or damaged, or holds more than an index.
    """
    path = checkpoint / ".metadata"
    try:
        with path.open("rb") as stream:
            metadata = _IndexUnpickler(stream).load()
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not readable as a checkpoint's index ({error}); take another checkpoint"
        ) from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path}: not a checkpoint's index; take another checkpoint")
    return metadata
