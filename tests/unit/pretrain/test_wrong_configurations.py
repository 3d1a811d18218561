"""Random wrong configurations end in one line, with exit code 2, or are none: see the support."""

from collections import Counter
from pathlib import Path

import pytest

from tests.support.wrong_configurations import run_wrong_configurations

COUNT = 100


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_wrong_configuration_ends_in_a_traceback_or_hangs(tiny_data: Path, seed: int) -> None:
    ends = list(run_wrong_configurations(tiny_data, seed, COUNT))
    assert [end for end in ends if end.kind not in ("accepted", "refused")] == []
    # The draws would show little if most were legal.
    assert Counter(end.kind for end in ends)["refused"] > COUNT / 2
