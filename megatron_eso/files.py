"""Files and folders that appear whole or not at all, even if a process is killed.

A file is written as `NAME.unfinished` and a folder as `.NAME.building`. A rename gives them their
names after everything is on the disk. The next writer of the same name removes the remains of a
killed writer.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from megatron_eso.errors import UserError
from megatron_eso.locks import hold_lock

LOCK_FILE = "lock"
"""A file in an unfinished folder; its writer holds this lock."""
_WRONG_PLACE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR),
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)


@contextmanager
def new_path(path: Path, unfinished: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path; the file that the body writes there gets the name `path` at the end.

    An existing file is replaced. If the body raises, the temporary file is removed and `path` does
    not change.

    Args:
        path: The final path.
        unfinished: The temporary path, in the same folder; by default `NAME.unfinished`.
    """
    unfinished = unfinished or path.with_name(f"{path.name}.unfinished")
    try:
        yield unfinished
        sync_path(unfinished)
        rename(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a stream; the bytes that the body writes become the content of `path` at the end.

    An existing file is replaced. If the body raises, `path` does not change.
    """
    with new_path(path) as unfinished, unfinished.open("wb") as stream:
        yield stream


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the content of a file; it is on the disk when this returns."""
    with new_file(path) as stream:
        stream.write(content)


def write_text(path: Path, text: str) -> None:
    """Replace the content of a file by text in UTF-8; it is on the disk when this returns."""
    write_bytes(path, text.encode("utf-8"))


def write_json(
    path: Path, value: Mapping[str, Any], *, indent: int = 1, sort_keys: bool = False
) -> None:
    """Replace the content of a file by a JSON object; it is on the disk when this returns."""
    write_text(path, json.dumps(value, indent=indent, sort_keys=sort_keys) + "\n")


def write_once(path: Path, text: str) -> None:
    """Write a file unless it exists; it is on the disk when this returns.

    If several processes call this, one of them writes the file.
    """
    if path.exists():
        return
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    unfinished.write_text(text, encoding="utf-8")
    sync_path(unfinished)
    with suppress(FileExistsError):
        os.link(unfinished, path)
    unfinished.unlink()
    sync_path(path.parent)


@contextmanager
def new_folder(
    folder: Path,
    *,
    replaces: Callable[[Path], bool] | None = None,
    building: Path | None = None,
) -> Iterator[Path]:
    """Yield an empty folder, which gets the name `folder` after the body has filled it.

    If the body raises, the new folder is removed and `folder` does not change. The remains of a
    killed process are removed at the start.

    Args:
        folder: The final path; it is missing or empty, or `replaces` returns true for it.
        replaces: Returns whether an existing folder may be replaced; None: it may not.
        building: The temporary path, in the same parent folder; by default `.NAME.building`.

    Raises:
        FileExistsError: `folder` holds something that must not be replaced.
        UserError: Another process is writing the same folder, or the file system has no locks.
    """
    building = building or folder.with_name(f".{folder.name}.building")
    _check_replaceable(folder, replaces)
    with hold_lock(building / LOCK_FILE) as lock:
        if not lock.is_held:
            raise UserError(f"another process is writing {building}; wait for it")
        try:
            # Check again: another process may have written it before this one held the lock.
            _check_replaceable(folder, replaces)
            empty_folder(building)
            yield building
            sync_tree(building)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        _put_in_place(building, folder)


def is_taken(folder: Path) -> bool:
    """Return whether the path exists and is not an empty folder."""
    try:
        return any(folder.iterdir())
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        return True


def is_wrong_path(error: OSError) -> bool:
    """Return whether the path causes the error: it is invalid, or this user may not write there."""
    return error.errno in _WRONG_PLACE


def empty_folder(folder: Path) -> None:
    """Remove everything in an unfinished folder except its lock."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK_FILE:
            entry.unlink()


def remove_folder(folder: Path, leftover: Path) -> None:
    """Remove a folder, which loses its name before its first file is removed.

    Args:
        folder: The folder to remove.
        leftover: The name of the folder during its removal, in the same parent folder.
    """
    shutil.rmtree(leftover, ignore_errors=True)
    folder.replace(leftover)
    shutil.rmtree(leftover)


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder; the new name is on the disk when this returns."""
    source.replace(target)
    sync_path(target.parent)


def sync_path(path: Path) -> None:
    """Write the content of a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Write every file below `folder`, with its name, to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync_path(path)


def _check_replaceable(folder: Path, replaces: Callable[[Path], bool] | None) -> None:
    if is_taken(folder) and not (replaces is not None and replaces(folder)):
        raise FileExistsError(errno.EEXIST, "exists and must not be replaced", str(folder))


def _put_in_place(building: Path, folder: Path) -> None:
    """Give a finished folder its name; remove the folder that had the name before."""
    replaced = folder.with_name(f".{folder.name}.replaced")
    if is_taken(folder):
        shutil.rmtree(replaced, ignore_errors=True)
        folder.replace(replaced)
    rename(building, folder)
    # The lock file is removed last: without it, another process could empty the folder.
    (folder / LOCK_FILE).unlink()
    sync_path(folder)
    shutil.rmtree(replaced, ignore_errors=True)
