"""Reading of torch files without executing what they name.

A pickle names functions and classes and has them called. Here only a short list of containers and
of torch's tensor rebuilding is known; every other name becomes an inert `Placeholder` class, which
keeps what it was given and runs nothing. No module is imported because a pickle names it.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import _utils as torch_utils

from megatron_eso.errors import CheckpointError


class Placeholder:
    """Stands for an object of an unknown class: keeps what it is given, and runs nothing."""

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
    """A plain dict in place of a defaultdict, whose factory would be called."""
    return {}


DTYPE_NAMES = (
    *("float64", "float32", "float16", "bfloat16"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)

KNOWN: dict[tuple[str, str], Any] = {
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
"""All that a pickle may name; torch.load itself looks up the names of storages."""


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that makes a placeholder of every name that is not in `KNOWN`."""

    def find_class(self, module: str, name: str) -> Any:
        """Look up a name without importing anything."""
        known = KNOWN.get((module, name))
        if known is not None:
            return known
        return type("Placeholder", (Placeholder,), {"qualified_name": f"{module}.{name}"})


class _TorchPickle:
    """What `torch.load` uses in place of the module `pickle`."""

    __name__ = "restricted_pickle"
    Unpickler = RestrictedUnpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        """Read one pickle."""
        return RestrictedUnpickler(file, **options).load()


def load_torch_file(path: str | Path) -> Any:
    """Read a zip-format torch file, its tensors mapped from the file, without executing anything.

    Raises:
        CheckpointError: missing, damaged, or in a format that cannot be read safely.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: not found; give the path of a checkpoint file")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{path}: no zip-format torch file (damaged, or older than torch 1.6); save it again "
            "with a newer torch"
        ) from None
    # torch.load would hand a TorchScript archive to its own loader.
    if any(Path(name).name == "constants.pkl" for name in names):
        raise CheckpointError(f"{path}: a TorchScript archive; give a Lightning checkpoint")
    try:
        return torch.load(
            path, map_location="cpu", mmap=True, weights_only=False, pickle_module=_TorchPickle()
        )
    # Whatever a damaged or hostile pickle breaks becomes one error.
    except (
        pickle.UnpicklingError,
        *(EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError),
    ) as error:
        raise CheckpointError(
            f"{path}: damaged ({type(error).__name__}: {error}); copy it again from its source"
        ) from None


def plain_value(value: Any) -> Any:
    """Dicts, lists and scalars of an OmegaConf object read as placeholders; others stay."""
    if isinstance(value, Placeholder) and isinstance(value.state, dict):
        for key in ("_content", "_val"):
            if key in value.state:
                return plain_value(value.state[key])
    if isinstance(value, Mapping):
        return {plain_value(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    return value
