"""The index of a checkpoint's files, whose sizes and hashes show damage before the files are read.

`index.json` is in the folder of the files that it lists. It is written last and holds its own
checksum.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from megatron_eso.errors import CheckpointError
from megatron_eso.files import write_text

FILE_INDEX = "index.json"
FORMAT_VERSION = 1

_CHUNK_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class FileEntry:
    """The expected size and hash of a file."""

    bytes: int
    xxh3_128: str


Index = Mapping[str, FileEntry]


def describe_file(path: Path) -> FileEntry:
    """Return the present size and hash of a file."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(size, digest.hexdigest())


def write_file_index(folder: Path, index: Index) -> None:
    """Write the index of a folder's files; on disk when this returns."""
    files = {name: asdict(index[name]) for name in sorted(index)}
    content = {"format_version": FORMAT_VERSION, "files": files, "checksum": _checksum(files)}
    write_text(folder / FILE_INDEX, json.dumps(content, indent=1) + "\n")


def read_file_index(folder: Path) -> Index:
    """Read the index of a folder.

    Raises:
        CheckpointError: The index is missing or damaged, or has another version.
    """
    path = folder / FILE_INDEX
    try:
        content = json.loads(path.read_text(encoding="ascii"))
        files, version = content["files"], content["format_version"]
        if content["checksum"] != _checksum(files):
            raise ValueError("its checksum differs")
        index = {name: FileEntry(**entry) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); take another checkpoint"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {version}, this version reads {FORMAT_VERSION}: use the "
            f"megatron-eso that wrote it"
        )
    return index


def find_damage(folder: Path, index: Index, names: Iterable[str] | None = None) -> Iterator[str]:
    """Compare the files of a folder with its index; yield a line for each problem.

    Args:
        folder: The folder of the files.
        index: The index of the folder.
        names: The files to check; by default all files of the index.
    """
    for name in index if names is None else names:
        path = folder / name
        try:
            size = path.stat().st_size
            if size != index[name].bytes:
                yield f"{path}: has {size} bytes, not {index[name].bytes}"
            elif describe_file(path) != index[name]:
                yield f"{path}: its hash differs"
        except OSError as error:
            yield f"{path}: cannot be read ({error.strerror})"


def _checksum(files: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode("ascii"))
