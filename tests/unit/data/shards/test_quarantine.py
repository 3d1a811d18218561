"""Quarantine: listed records are never read, and all other data rows stay the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eso.data.shards.format import ShardLayout
from megatron_eso.data.shards.quarantine import Quarantine
from megatron_eso.errors import DataError

SUBSTITUTES = [976482, 639931, 966798]


def make_layout(num_records: int, record_tokens: int = 35, last_tokens: int = 35) -> ShardLayout:
    return ShardLayout(
        dtype="u16",
        record_tokens=record_tokens,
        shard_records=4,
        num_tokens=(num_records - 1) * record_tokens + last_tokens,
    )


def listing(*records: int) -> Quarantine:
    return Quarantine(records={"id": tuple(sorted(set(records)))})


@settings(max_examples=60)
@given(
    num_records=st.integers(3, 40),
    last_tokens=st.integers(1, 35),
    length=st.integers(1, 35),
    data=st.data(),
)
def test_substitutes_are_sound_and_the_rest_stays(
    num_records: int, last_tokens: int, length: int, data: st.DataObject
) -> None:
    layout = make_layout(num_records, last_tokens=last_tokens)
    rows = np.arange(layout.num_rows(length))
    most = (num_records - 1) // 2
    bad = data.draw(st.sets(st.integers(0, num_records - 1), min_size=1, max_size=most))
    fewer = sorted(bad)[:-1]
    quarantine = listing(*bad)
    quarantine.check("id", layout)
    found = quarantine.substitute("id", layout, rows, length)
    record_of, _ = layout.locate_rows(rows, length)
    is_bad = np.isin(record_of, sorted(bad))
    assert np.array_equal(found[~is_bad], rows[~is_bad])
    assert not np.isin(layout.locate_rows(found, length)[0], sorted(bad)).any()
    assert np.isin(found, rows).all()
    # The substitute of a data row does not depend on the other data rows of the call.
    alone = [quarantine.substitute("id", layout, rows[n : n + 1], length)[0] for n in rows]
    assert np.array_equal(alone, found)
    # A longer list changes only the substitutes in its new records.
    before = listing(*fewer).substitute("id", layout, rows, length)
    must_move = np.isin(layout.locate_rows(before, length)[0], sorted(bad))
    assert np.array_equal(before[~must_move], found[~must_move])


def test_substitutes_are_spread_over_the_dataset() -> None:
    layout = make_layout(1000, record_tokens=1000, last_tokens=1000)
    rows = np.arange(5000, 6000)
    found = listing(5).substitute("id", layout, rows, 1)
    counts = np.bincount(found // 1000, minlength=1000)
    assert counts[5] == 0
    assert counts.max() < 10  # Poisson with mean 1: beyond 9 once in a thousand lists
    assert np.count_nonzero(counts == 0) == pytest.approx(1000 / np.e, rel=0.15)
    # Runs rely on these numbers.
    assert listing(5).substitute("id", layout, rows[:3], 1).tolist() == SUBSTITUTES


def test_what_is_not_listed_is_left_alone() -> None:
    rows = np.array([3, 1, 2])
    assert listing(0).substitute("other", make_layout(9), rows, 5) is rows
    assert Quarantine().sha256 is None
    assert listing(1, 2).sha256 == listing(2, 1).sha256 != listing(1).sha256


@pytest.mark.parametrize(
    ("records", "message"),
    [((9,), r"has records 0 to 8, not \[9, 9\]"), ((-1, 3), "not"), (range(5), "half or more")],
)
def test_lists_that_do_not_fit_are_refused(records: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        listing(*records).check("id", make_layout(9))
    listing(*records).check("other", make_layout(9))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format_version": 2, "records": {}}',
        '{"format_version": 1, "records": {"id": 3}}',
        '{"format_version": 1, "records": {"id": [true]}}',
        '{"format_version": 1, "records": {"id": ["3"]}}',
        '{"format_version": 1, "records": {}, "more": 1}',
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"^data\.quarantine = .*list\.json: ") as raised:
        Quarantine.read(path)
    assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match="cannot be read"):
        Quarantine.read(tmp_path / "absent.json")


def test_a_list_is_read_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"format_version": 1, "records": {"id": [3, 1, 3], "no": []}}))
    assert Quarantine.read(path).records == {"id": (1, 3)}
