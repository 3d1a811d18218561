"""A file system that hangs holds no step: the status of a running run is written by a thread."""

import threading
from pathlib import Path

import pytest

from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.training.records import status_writer
from megatron_eso.training.records.status_writer import StatusWriter


def test_a_write_that_hangs_holds_neither_the_steps_nor_the_end() -> None:
    writer, may_end, written = StatusWriter(), threading.Event(), []

    def hang() -> None:
        may_end.wait()
        written.append(1)

    writer.start(hang)
    for _ in range(3):  # further statuses are left out meanwhile
        writer.start(lambda: written.append(2))
    assert written == []
    may_end.set()
    writer.wait()
    writer.start(lambda: written.append(3))
    writer.wait()
    assert written == [1, 3]


def test_the_last_status_is_not_replaced_by_the_one_before(tmp_path: Path) -> None:
    run, writer = RunDirectory(tmp_path), StatusWriter()
    for step in range(20):
        writer.start(lambda step=step: run.write_status("running", step))
        writer.wait()
        run.write_status("finished", step)
        status = run.read_status()
        assert status is not None
        assert (status.state, status.step) == ("finished", step)


def test_the_end_of_a_run_waits_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_writer, "WAIT_SECONDS", 0.01)
    writer, may_end, written = StatusWriter(), threading.Event(), []

    def hang() -> None:
        may_end.wait()
        written.append(1)

    writer.start(hang)
    writer.wait()
    assert written == []  # the write still hangs
    may_end.set()
