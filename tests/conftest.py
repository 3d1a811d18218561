"""Fixtures and rules for the whole suite."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePath

import pytest
from hypothesis import settings

from tests.support.tiny_data import build_tiny_data
from tests.support.world import World

# A slow machine is not a failure; the tests' own time limit finds what hangs.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Worker processes for tests of several ranks; see tests/support/world.py."""
    with World() as workers:
        yield workers


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build small datasets, `train` and `validation`; see tests/support/tiny_data.py."""
    return build_tiny_data(tmp_path_factory.mktemp("tiny_data"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none."""
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not for_gpu:
        return
    import torch  # seconds, for the tests of a GPU only

    if not torch.cuda.is_available():
        for item in for_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how long the tests of each folder took, fixtures included."""
    seconds: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                path, _, _ = report.nodeid.partition("::")
                seconds[PurePath(path).parent.as_posix()] += report.duration
    if seconds:
        terminalreporter.section("seconds by folder")
    for folder, total in sorted(seconds.items()):
        terminalreporter.write_line(f"{total:8.1f} s  {folder}")
