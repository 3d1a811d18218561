"""The committed pictures are the output of their script."""

import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "pictures"
PICTURES = runpy.run_path(str(FOLDER / "draw.py"))["PICTURES"]


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_a_picture_is_the_output_of_the_script(name: str) -> None:
    written = (FOLDER / name).read_text(encoding="utf-8")
    assert written == PICTURES[name](), "run python docs/pictures/draw.py"
    assert ElementTree.fromstring(written).tag.endswith("svg")


def test_no_other_picture_is_committed() -> None:
    assert {path.name for path in FOLDER.glob("*.svg")} == set(PICTURES)


def test_the_row_plan_of_the_picture_is_that_of_the_paper() -> None:
    drawing = PICTURES["rows.svg"]()
    assert "12 rows, 144 scores" in drawing
    # T - 1 clean rows and m queries; causal scores, then 2 + 3 + 4 + 5 keys and m self terms.
    assert f"{5 + 4} rows, {15 + 14 + 4} scores" in drawing
