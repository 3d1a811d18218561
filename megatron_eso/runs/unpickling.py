"""Reading of pickles without executing what they name, for everything that this package unpickles.

A pickle can call any function or class that it names. The two unpicklers here have short lists of
allowed names. The unpickler of a distributed checkpoint's `.metadata` refuses any other name. The
unpickler of torch files replaces any other object by a `Placeholder`, which keeps its arguments and
executes nothing: checkpoints of other programs hold objects that the tensors do not need. A name in
a pickle never causes an import.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import _utils as torch_utils
from torch.distributed.checkpoint.metadata import Metadata

from megatron_eso.errors import CheckpointError

METADATA_FILE = ".metadata"

METADATA_NAMES = {
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


class MetadataUnpickler(pickle.Unpickler):
    """An unpickler that refuses every name that is not in `METADATA_NAMES`."""

    def find_class(self, module: str, name: str) -> Any:
        """Look up an allowed name.

        Raises:
            UnpicklingError: The name is not allowed.
        """
        if (module, name) not in METADATA_NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


# Errors that unpickling of damaged bytes raises.
DAMAGE = (
    *(pickle.UnpicklingError, EOFError, OSError, ImportError, MemoryError, OverflowError),
    *(AttributeError, IndexError, KeyError, TypeError, ValueError),
)


def unpickle_metadata(checkpoint: Path) -> Metadata:
    """Read the `.metadata` of a distributed checkpoint, torch's index of its tensors.

    Raises:
        CheckpointError: The file is missing or damaged, holds more than an index, or names files in
            other folders.
    """
    path = checkpoint / METADATA_FILE
    try:
        with path.open("rb") as stream:
            metadata = MetadataUnpickler(stream).load()
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


class Placeholder:
    """A stand-in for an object of an unknown class, which keeps its data and executes nothing."""

    qualified_name = "?"

    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **_: Any) -> Self:
        """Keep the arguments; a pickle makes objects with `__init__` and without."""
        self = super().__new__(cls)
        self.args, self.state, self.items = args, None, []
        return self

    def __setstate__(self, state: Any) -> None:
        """Keep the state."""
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keep an item."""
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        """Keep an item."""
        self.items.append(value)

    def extend(self, values: Any) -> None:
        """Keep items."""
        self.items.extend(values)

    def add(self, value: Any) -> None:
        """Keep an item."""
        self.items.append(value)


def _default_dict(*_: Any) -> dict[Any, Any]:
    """Return a plain dict in place of a defaultdict, which would call its factory."""
    return {}


DTYPE_NAMES = (
    *("float64", "float32", "float16", "bfloat16"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)

TORCH_FILE_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): _default_dict,
    **{
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")
        for kind in (dict, list, set, tuple)
    },
    ("torch._utils", "_rebuild_tensor_v2"): torch_utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch_utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    **{("torch", name): getattr(torch, name) for name in DTYPE_NAMES},
}
"""All names that a torch file may use; torch.load itself looks up those of storages."""


class TorchFileUnpickler(pickle.Unpickler):
    """An unpickler that makes a placeholder of every name that is not in `TORCH_FILE_NAMES`."""

    def find_class(self, module: str, name: str) -> Any:
        """Look up a name without an import; return a placeholder class for an unknown one."""
        known = TORCH_FILE_NAMES.get((module, name))
        if known is not None:
            return known
        return type("Placeholder", (Placeholder,), {"qualified_name": f"{module}.{name}"})


class _TorchPickle:
    """A replacement for the module `pickle` in `torch.load`."""

    __name__ = "unpickling"
    Unpickler = TorchFileUnpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        """Read one pickle."""
        return TorchFileUnpickler(file, **options).load()


def load_torch_file(path: str | Path) -> Any:
    """Read a zip-format torch file without executing anything; tensors are mapped from the file.

    Raises:
        CheckpointError: The file is missing or damaged, or cannot be read safely.
    """
    # Refuse files that torch would read in another way.
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: not found; give the path of a checkpoint file")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{path}: is not a zip-format torch file (damaged, or older than torch 1.6); save it "
            "again with a newer torch"
        ) from None
    # torch.load passes a TorchScript archive to another loader.
    if any(Path(name).name == "constants.pkl" for name in names):
        raise CheckpointError(f"{path}: a TorchScript archive; give a Lightning checkpoint")
    try:
        return torch.load(
            path, map_location="cpu", mmap=True, weights_only=False, pickle_module=_TorchPickle()
        )
    # All errors of a damaged or hostile pickle become one error.
    except (
        pickle.UnpicklingError,
        *(EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError),
    ) as error:
        raise CheckpointError(
            f"{path}: damaged ({type(error).__name__}: {error}); copy it again from its source"
        ) from None


def plain_value(value: Any) -> Any:
    """Convert an OmegaConf object that was read as placeholders to dicts, lists and scalars."""
    if isinstance(value, Placeholder) and isinstance(value.state, dict):
        for key in ("_content", "_val"):
            if key in value.state:
                return plain_value(value.state[key])
    if isinstance(value, Mapping):
        return {plain_value(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    return value
