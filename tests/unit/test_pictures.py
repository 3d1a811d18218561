"""The committed pictures are the output of their script; rows and masks of a picture agree."""

import runpy
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "pictures"
# A script finds the files of its own folder.
sys.path.insert(0, str(FOLDER))
PICTURES = runpy.run_path(str(FOLDER / "draw.py"))["PICTURES"]
OBJECTIVES = runpy.run_path(str(FOLDER / "objectives.py"))
MASK = OBJECTIVES["MASK"]
PANELS = {
    f"{name} {number}": make
    for name, (_, panels) in OBJECTIVES["PANELS"].items()
    for number, make in enumerate(panels)
}


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


@pytest.mark.parametrize("name", PANELS)
def test_a_row_plan_reads_what_the_mask_of_the_paper_allows(name: str) -> None:
    panel: Any = PANELS[name]()
    numbers = [panel.paper.index(row) for row in panel.rows]
    assert len(set(numbers)) == len(numbers)
    # Rows of the plan read the same rows as in the paper, and no row that the plan leaves out.
    expected = np.zeros((len(numbers), len(panel.paper)), dtype=np.bool_)
    expected[:, numbers] = panel.reads
    assert (panel.mask[numbers] == expected).all()
    # Every mask carries loss; AR has one, and every row carries loss.
    is_mask = [row.token == MASK for row in panel.rows]
    num_masked = sum(row.token == MASK for row in panel.paper)
    if name.startswith("eso_lm_next"):
        # A row without a mask predicts the token after its own.
        assert sum(is_mask) < len(panel.targets) == num_masked
        shift = [not masked for masked in is_mask]
    else:
        assert sum(is_mask) == num_masked
        expected_rows = [name.startswith("ar") or masked for masked in is_mask]
        assert list(panel.targets) == np.flatnonzero(expected_rows).tolist()
        shift = [False] * len(is_mask)
    for number, target in panel.targets.items():
        assert target == panel.rows[number].position + shift[number]
