"""Retries of a failed call after pauses."""

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

_T = TypeVar("_T")


def retry(
    call: Callable[[], _T],
    *,
    errors: type[Exception] | tuple[type[Exception], ...],
    pauses: Iterable[float],
    on_error: Callable[[Exception, float], None],
) -> _T:
    """Call a function until it succeeds: one attempt, and one more after each pause.

    Args:
        call: The function, without arguments.
        errors: The errors after which it is called again; other errors are raised at once.
        pauses: Seconds to wait after each failure.
        on_error: Called before each pause with the error and the seconds, which it logs. It may
            raise to give up.

    Returns:
        The return value of `call`.

    Raises:
        Exception: The error of the last attempt.
    """
    for seconds in pauses:
        try:
            return call()
        except errors as error:
            on_error(error, seconds)
        time.sleep(seconds)
    return call()
