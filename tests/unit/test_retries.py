"""Calls that are repeated after errors."""

import pytest

from megatron_eso.retries import retry


class Faults:
    """An action that fails a given number of times."""

    def __init__(self, number: int, error: Exception) -> None:
        self.left = number
        self.error = error
        self.reported: list[tuple[str, float]] = []

    def __call__(self) -> str:
        if self.left:
            self.left -= 1
            raise self.error
        return "done"

    def report(self, error: Exception, seconds: float) -> None:
        self.reported.append((str(error), seconds))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_error_that_passes_is_reported_and_retried(number: int) -> None:
    faults = Faults(number, OSError("x"))
    assert retry(faults, errors=OSError, pauses=(0.0, 0.01), on_error=faults.report) == "done"
    assert faults.reported == [("x", 0.0), ("x", 0.01)][:number]


def test_the_last_error_escapes() -> None:
    faults = Faults(9, OSError("x"))
    with pytest.raises(OSError, match="x"):
        retry(faults, errors=OSError, pauses=(0.0, 0.0), on_error=faults.report)
    assert len(faults.reported) == 2
    assert faults.left == 6


def test_other_errors_escape_at_once() -> None:
    faults = Faults(9, KeyError("x"))
    with pytest.raises(KeyError):
        retry(faults, errors=(OSError, ValueError), pauses=(0.0,), on_error=faults.report)
    assert not faults.reported


def test_the_report_gives_up() -> None:
    def give_up(error: Exception, seconds: float) -> None:
        raise RuntimeError(f"{error}, {seconds}")

    with pytest.raises(RuntimeError, match=r"x, 60\.0"):
        retry(Faults(1, OSError("x")), errors=OSError, pauses=(60.0,), on_error=give_up)
