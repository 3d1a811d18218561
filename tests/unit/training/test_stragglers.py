"""The rank that is reported as slow."""

import pytest

from megatron_eso.training.guards.stragglers import pick_straggler


@pytest.mark.parametrize(
    ("seconds", "rank", "spread", "is_notable"),
    [
        ([1.0, 1.0, 1.5, 1.0], 2, 1.5, True),
        ([1.0, 1.02, 1.01, 1.0], 1, 1.02 / 1.005, False),
        ([0.001, 0.002, 0.001], 1, 2.0, False),  # too short to matter
        ([2.0], 0, 1.0, False),
        ([0.0, 0.0], 0, 1.0, False),
    ],
)
def test_the_slowest_rank_against_the_median(
    seconds: list[float], rank: int, spread: float, is_notable: bool
) -> None:
    found = pick_straggler(seconds, [f"host{number}" for number in range(len(seconds))])
    assert (found.rank, found.host, found.seconds) == (rank, f"host{rank}", seconds[rank])
    assert found.spread == pytest.approx(spread)
    assert found.is_notable is is_notable
