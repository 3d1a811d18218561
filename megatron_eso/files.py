"""Files that a kill at any instant leaves whole: either the old content or the new."""

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Replace the file's content; on disk when this returns."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_path(path.parent)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace the file's content by `value`; on disk when this returns."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def sync_path(path: Path) -> None:
    """Have a file's content, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Have every file below `folder`, and their names, on disk."""
    for path in (*folder.rglob("*"), folder):
        sync_path(path)
