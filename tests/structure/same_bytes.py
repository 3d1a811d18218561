"""How the products of two commits are compared: byte for byte, apart from what may differ.

May differ: the clock, the process and the host; keys of a JSON file that only the new commit has;
the code files of a sampler directory. Where the bytes of a checkpoint or of weights differ, tensors
are compared by name.
"""

import fnmatch
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

IGNORED = ("*.lock", "*.py", "*/tensorboard/*", "*/logs/*")
# torch gives each save an identifier of its own.
SAVE_ID = re.compile(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
STATUS_CLOCK = {"time", "host", "hosts", "pid", "job"}
MAX_SHOWN = 3


@dataclass(kw_only=True)
class Comparison:
    """What two files or folders have in common."""

    num_files: int = 0
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Differences that are allowed."""

    def __str__(self) -> str:
        listed = self.differences or self.notes
        shown = [*listed[:MAX_SHOWN], *(["..."] if len(listed) > MAX_SHOWN else [])]
        return "; ".join([f"{self.num_files} files", *shown])


def compare(old: Path, new: Path) -> Comparison:
    """Compare two files, or two folders with all that is in them."""
    result = Comparison()
    names = sorted(list_files(old) | list_files(new))
    if not names:
        result.differences.append("nothing is there")
    other_tensors = set()
    for name in names:
        pair = old / name, new / name
        result.num_files += 1
        if not (pair[0].is_file() and pair[1].is_file()):
            owner = "new" if pair[1].is_file() else "old"
            result.differences.append(f"{name}: only the {owner} commit makes it")
        elif read_bytes(pair[0]) != read_bytes(pair[1]):
            if pair[0].suffix == ".distcp" or pair[0].name == ".metadata":
                other_tensors.add(Path(name).parent)
            else:
                compare_contents(name, *pair, result)
    for folder in sorted(other_tensors):
        difference = compare_tensors(read_tensors(old / folder), read_tensors(new / folder))
        if difference:
            result.differences.append(f"{folder}: {difference}")
        else:
            result.notes.append(f"{folder}: equal tensors in other bytes")
    result.notes += list_other_code(old, new)
    return result


def list_other_code(old: Path, new: Path) -> list[str]:
    """List the code files of two folders that differ, which is allowed."""
    names = {path.name for folder in (old, new) for path in folder.glob("*.py")}
    different = [
        name
        for name in sorted(names)
        if not ((old / name).is_file() and (new / name).is_file())
        or (old / name).read_bytes() != (new / name).read_bytes()
    ]
    return [f"other code in {', '.join(different)}"] if different else []


def read_bytes(path: Path) -> bytes:
    """Read a file; torch's `.metadata` without the identifier of the save."""
    content = path.read_bytes()
    return SAVE_ID.sub(b"", content) if path.name == ".metadata" else content


def list_files(path: Path) -> set[str]:
    """Relative names of the files that are compared; `.` for a file."""
    if path.is_file():
        return {"."}
    found = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return {name for name in found if not any(fnmatch.fnmatch("/" + name, p) for p in IGNORED)}


def compare_contents(name: str, old: Path, new: Path, result: Comparison) -> None:
    """Compare files whose bytes differ by what they mean."""
    if old.suffix == ".safetensors":
        difference = compare_tensors(load_file(old), load_file(new))
        (result.differences if difference else result.notes).append(
            f"{name}: {difference or 'equal tensors in other bytes'}"
        )
        return
    read = READERS.get(old.name)
    if read is None:
        result.differences.append(f"{name}: other bytes")
        return
    contents = read(old), read(new)
    missing = find_difference(*contents)
    if missing is not None:
        result.differences.append(f"{name}: {missing}")
    else:
        added = find_difference(contents[1], contents[0])
        if added is not None:
            result.notes.append(f"{name}: {added}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records without what depends on the clock."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {key: value for key, value in record.items() if not key.startswith("perf/")}
        for record in records
    ]


def read_status(path: Path) -> dict[str, Any]:
    """Read the status without clock, host and process."""
    return {k: v for k, v in json.loads(path.read_text()).items() if k not in STATUS_CLOCK}


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text())


def read_index(path: Path) -> Any:
    """Read the hashes of a checkpoint's files, except those that are compared by content."""
    content = json.loads(path.read_text())
    del content["checksum"]
    by_content = {"config.json", "state.json", ".metadata"}
    content["files"] = {
        name: entry
        for name, entry in content["files"].items()
        if name not in by_content and not name.endswith(".distcp")
    }
    return content


# Files that may differ in their bytes, by name.
READERS: dict[str, Callable[[Path], Any]] = {
    "metrics.jsonl": read_metrics,
    "status.json": read_status,
    "config.json": read_json,
    "index.json": read_index,
}


def find_difference(old: Any, new: Any, where: str = "") -> str | None:
    """Find the first value of `old` that `new` lacks or changes; None where there is none."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in old.items():
            inside = f"{where}.{key}".strip(".")
            if key not in new:
                return f"{inside} stands on one side only"
            difference = find_difference(value, new[key], inside)
            if difference is not None:
                return difference
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        found = (find_difference(a, b, f"{where}[{number}]") for number, (a, b) in pairs)
        return next((difference for difference in found if difference is not None), None)
    return None if repr(old) == repr(new) else f"{where}: {old!r:.60} and {new!r:.60}"


def compare_tensors(old: dict[str, Tensor], new: dict[str, Tensor]) -> str | None:
    """Find the first tensor that differs in name, dtype, shape or a bit."""
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            return f"tensor {name}: only one has it"
        a, b = old[name], new[name]
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"tensor {name}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        if not torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)):
            return f"tensor {name}: other values, {(a != b).double().mean():.0%} of them"
    return None


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Read the tensors of a distributed checkpoint."""
    # Imported late: it takes seconds, and is needed only where bytes differ.
    from torch.distributed import checkpoint as torch_checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = torch_checkpoint.FileSystemReader(str(checkpoint))
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is one process
        torch_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
