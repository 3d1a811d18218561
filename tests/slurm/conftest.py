"""Starts one Slurm cluster for all tests of this folder; reports if they could not run."""

import os
from collections.abc import Iterator

import pytest

from tests.support.slurm_cluster import SlurmCluster, missing_programs


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Two nodes; see tests/support/slurm_cluster.py."""
    missing = missing_programs()
    if missing and os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"CI runs the Slurm tests: {missing}")
    if missing:
        pytest.skip(missing)
    with SlurmCluster() as cluster:
        yield cluster


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print that the Slurm tests were not run."""
    missing = missing_programs()
    if missing:
        terminalreporter.write_line(f"NOT RUN: the tests on real Slurm: {missing}", red=True)
