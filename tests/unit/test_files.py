"""Files and folders appear whole or not at all, with kills, errors and several writers."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_eso.errors import UserError
from megatron_eso.files import (
    LOCK_FILE,
    new_file,
    new_folder,
    new_path,
    remove_folder,
    write_bytes,
    write_json,
    write_once,
    write_text,
)
from megatron_eso.locks import hold_lock
from tests.support.processes import HANG_SECONDS


def list_names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_has_its_name_with_all_its_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"first", b"second"):
        before = path.read_bytes() if path.exists() else None
        with new_file(path) as stream:
            stream.write(content)
            stream.flush()
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == content
    assert list_names(tmp_path) == ["file"]


def test_text_bytes_and_json(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "naïve\n")
    assert (tmp_path / "text").read_bytes() == "naïve\n".encode()
    write_bytes(tmp_path / "bytes", b"\xff\0")
    assert (tmp_path / "bytes").read_bytes() == b"\xff\0"
    write_json(tmp_path / "json", {"b": 1, "a": [2]}, sort_keys=True)
    assert (tmp_path / "json").read_text() == '{\n "a": [\n  2\n ],\n "b": 1\n}\n'


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with suppress(ZeroDivisionError), new_file(tmp_path / "file") as stream:
        stream.write(b"new")
        stream.flush()
        raise ZeroDivisionError
    assert (tmp_path / "file").read_text() == "old"
    assert list_names(tmp_path) == ["file"]


def test_a_temporary_path_may_be_given(tmp_path: Path) -> None:
    with new_path(tmp_path / "file", tmp_path / "mine.tmp") as unfinished:
        assert unfinished == tmp_path / "mine.tmp"
        unfinished.write_text("content")
    assert list_names(tmp_path) == ["file"]


def test_one_of_several_writes_once(tmp_path: Path) -> None:
    texts = [f"{number} " * 1000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_once, [tmp_path / "file"] * 8, texts))
    assert (tmp_path / "file").read_text() in texts
    assert list_names(tmp_path) == ["file"]


def test_a_folder_has_its_name_with_all_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with new_folder(folder) as building:
        (building / "inner").mkdir()
        (building / "inner" / "file").write_text("content")
        assert not folder.exists()
    assert list_names(tmp_path) == ["folder", "folder/inner", "folder/inner/file"]


def test_an_empty_folder_is_filled_and_a_taken_one_is_kept(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for content in ("first", "second"):
        is_taken = content == "second"
        try:
            with new_folder(tmp_path / "folder") as building:
                (building / "file").write_text(content)
        except FileExistsError:
            assert is_taken
    assert list_names(tmp_path) == ["folder", "folder/file"]
    assert (tmp_path / "folder" / "file").read_text() == "first"


def test_a_folder_is_replaced_where_that_is_allowed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for content in ("first", "second"):
        with new_folder(folder, replaces=lambda old: (old / "file").exists()) as building:
            (building / "file").write_text(content)
            if content == "second":
                assert (folder / "file").read_text() == "first"
    assert (folder / "file").read_text() == "second"
    assert list_names(tmp_path) == ["folder", "folder/file"]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    with (
        suppress(ZeroDivisionError),
        new_folder(tmp_path / "folder", replaces=lambda _: True) as building,
    ):
        (building / "file").write_text("new")
        raise ZeroDivisionError
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert list_names(tmp_path) == ["folder", "folder/file"]


def write_forever(folder: Path) -> None:
    """Replace a folder and a file of equal numbers again and again."""
    for number in range(10**6):
        with new_folder(folder / "pair", replaces=lambda _: True) as building:
            for name in ("a", "b"):
                (building / name).write_text(str(number))
        write_text(folder / "file", f"{number}\n" * 100)


def test_a_kill_at_any_instant_leaves_what_is_whole(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for number in range(12):
        process = context.Process(target=write_forever, args=(tmp_path,))
        process.start()
        while not (tmp_path / "file").exists():
            time.sleep(0.001)
        time.sleep(0.003 * number)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert len(set((tmp_path / "file").read_text().splitlines())) == 1
        assert len((tmp_path / "file").read_text().splitlines()) == 100
        whole = [path for path in (tmp_path / "pair", tmp_path / ".pair.replaced") if path.exists()]
        assert whole  # between two renames the old folder has the other name
        if whole[0].name == "pair":
            assert {"a", "b"} <= set(list_names(whole[0])) <= {"a", "b", LOCK_FILE}
            assert len({(whole[0] / name).read_text() for name in "ab"}) == 1
    with new_folder(tmp_path / "pair", replaces=lambda _: True) as building:
        (building / "a").write_text("end")
    write_text(tmp_path / "file", "end")
    assert list_names(tmp_path) == ["file", "pair", "pair/a"]


def test_a_live_writer_is_not_disturbed(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from megatron_eso.files import new_folder\n"
        f"with new_folder(pathlib.Path({str(tmp_path / 'folder')!r})) as building:\n"
        "    (building / 'file').write_text('whole'); print('here', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        other.stdout.readline()
        with (
            pytest.raises(UserError, match="another process is writing"),
            new_folder(tmp_path / "folder"),
        ):
            pass
        other.stdin.close()
        assert other.wait(HANG_SECONDS) == 0
    assert list_names(tmp_path) == ["folder", "folder/file"]


def test_a_writer_that_starts_during_the_rename_is_refused_or_writes_again(
    tmp_path: Path,
) -> None:
    """Let a second writer open the first one's lock just before the first removes it."""

    def write(number: int) -> int:
        try:
            with new_folder(tmp_path / "folder", replaces=lambda _: True) as building:
                (building / "a").write_text(str(number))
                (building / "b").write_text(str(number))
        except UserError:
            return 0
        return 1

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(write, range(200))) > 0
    assert list_names(tmp_path) == ["folder", "folder/a", "folder/b"]
    assert len({path.read_text() for path in (tmp_path / "folder").iterdir()}) == 1


def test_the_lock_of_an_unfinished_folder_is_in_it(tmp_path: Path) -> None:
    with (
        new_folder(tmp_path / "folder", building=tmp_path / "folder.building") as building,
        hold_lock(building / LOCK_FILE) as lock,
    ):
        assert building == tmp_path / "folder.building"
        assert not lock.is_held


def test_a_folder_that_is_removed_loses_its_name_first(tmp_path: Path) -> None:
    for name in ("folder", "folder.deleting"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("content")
    remove_folder(tmp_path / "folder", tmp_path / "folder.deleting")
    assert list_names(tmp_path) == []
