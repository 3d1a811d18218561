"""Call again what failed, after pauses."""

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
    """Call until there is no error, as often as there are pauses, and once more.

    Args:
        call: Called without arguments.
        errors: Those after which it is called again; all others, and that of the last call, escape.
        pauses: Seconds to wait after each failure.
        on_error: Called before each pause with the error and the seconds; it logs both. It raises
            to give up.

    Returns:
        What `call` returns.
    """
    for seconds in pauses:
        try:
            return call()
        except errors as error:
            on_error(error, seconds)
        time.sleep(seconds)
    return call()
