"""Sizes, durations and counts as text; reports of progress."""

import pytest

from megatron_eso.progress import Progress
from megatron_eso.quantities import (
    GIB,
    format_count,
    format_gib,
    format_mb,
    format_seconds,
    parse_count,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (360000, "100:00:00")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_sizes() -> None:
    assert format_gib(1.25 * GIB) == "1.25 GiB"
    assert format_gib(1234 * GIB) == "1.23e+03 GiB"
    assert format_mb(12_345_678) == "12.3 MB"


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("12", 12), ("1e9", 10**9), ("9007199254740993", 9007199254740993)],
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["-1", "1.5", "x", ""])
def test_other_texts_are_not_counts(text: str) -> None:
    with pytest.raises(ValueError, match="count|float"):
        parse_count(text)


def test_progress_reports_share_speed_and_time_left() -> None:
    lines: list[str] = []
    progress = Progress("work", 4_000_000, done=1_000_000, report=lines.append)
    progress.advance(2_000_000)
    progress.advance(-1_000_000)
    assert not lines
    progress.finish()
    (line,) = lines
    assert line.startswith("work: 50 %, 2.0 of 4.0 MB, ")
    assert line.endswith(" left")


def test_progress_counts_parts() -> None:
    lines: list[str] = []
    progress = Progress("work", 4, report=lines.append, unit="schedules")
    progress.advance(1)
    progress.finish()
    (line,) = lines
    assert line.startswith("work: 25 %, 1 of 4 schedules, ")
    assert " elapsed, " in line
    assert line.endswith(" left")


def test_progress_of_a_pipe_has_no_share(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("work", 0)
    progress.advance(2_000_000)
    assert progress.finish() >= 0
    line = capsys.readouterr().err
    assert line.startswith("work: 2.0 MB, ")
    assert line.endswith(" elapsed\n")


def test_a_count_has_the_number_of_its_noun() -> None:
    assert [format_count(number, "shard") for number in (0, 1, 2)] == [
        "0 shards",
        "1 shard",
        "2 shards",
    ]
