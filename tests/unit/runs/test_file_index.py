"""An index shows every kind of damage to the files that it lists, and to itself."""

import contextlib
from pathlib import Path

import pytest

from megatron_eso.errors import CheckpointError
from megatron_eso.runs.file_index import (
    FILE_INDEX,
    describe_file,
    find_damage,
    read_file_index,
    write_file_index,
)

NAMES = ("a.bin", "b.bin", "empty")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(bytes(range(256)) * (40 * (2 - number)))
    write_file_index(tmp_path, {name: describe_file(tmp_path / name) for name in NAMES})
    return tmp_path


def problems(folder: Path) -> list[str]:
    return list(find_damage(folder, read_file_index(folder)))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << (place % 8)
    path.write_bytes(data)


def test_sound_files_have_no_problems(folder: Path) -> None:
    assert problems(folder) == []


@pytest.mark.parametrize("name", NAMES[:2])
def test_damage_is_reported_with_the_file(folder: Path, name: str) -> None:
    flip(folder / name, 5000)
    assert problems(folder) == [f"{folder / name}: its hash differs"]
    size = (folder / name).stat().st_size
    with (folder / name).open("r+b") as file:
        file.truncate(size - 1)
    assert problems(folder) == [f"{folder / name}: has {size - 1} bytes, not {size}"]
    (folder / name).unlink()
    assert problems(folder) == [f"{folder / name}: cannot be read (No such file or directory)"]


def test_a_damaged_index_is_refused(folder: Path) -> None:
    path = folder / FILE_INDEX
    whole = path.read_bytes()
    described = {name: describe_file(folder / name) for name in NAMES}
    for place in range(len(whole)):
        flip(path, place)
        with contextlib.suppress(CheckpointError):  # or only white space changed
            assert dict(read_file_index(folder)) == described
        path.write_bytes(whole)
    for size in range(len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="index"):
            read_file_index(folder)
