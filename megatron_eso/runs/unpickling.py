"""Reading the index of a torch distributed checkpoint without executing what its pickle says.

torch reads `.metadata` with plain pickle, which runs any code that its writer put there.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_eso.errors import CheckpointError

# What Megatron-Core 0.16.1 asks of `metadata.json`.
TORCH_DIST_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

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


# What unpickling damaged bytes raises.
DAMAGE = (
    *(pickle.UnpicklingError, EOFError, OSError, ImportError, MemoryError, OverflowError),
    *(AttributeError, IndexError, KeyError, TypeError, ValueError),
)


def read_checkpoint_metadata(checkpoint: Path) -> Metadata:
    """Read the index of a distributed checkpoint.

    Raises:
        CheckpointError: It is missing or damaged, holds more than an index, or names files that lie
            elsewhere.
    """
    path = checkpoint / ".metadata"
    try:
        with path.open("rb") as stream:
            metadata = _IndexUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it is something else")
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError(f"it names the file {info.relative_path}")
    except DAMAGE as error:
        raise CheckpointError(
            f"{path}: not readable as a checkpoint's index ({error}); take another checkpoint"
        ) from error
    return metadata
