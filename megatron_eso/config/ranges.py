"""Ranges of numbers: read from annotated-types' bounds, checked, and put in words."""

from collections.abc import Iterable
from typing import Any

from annotated_types import Ge, Gt, Interval, Le, Lt


def read_interval(markers: Iterable[Any]) -> Interval:
    """The interval that the bounds among `markers` make; other markers are left out."""
    bounds: dict[str, Any] = {}
    for marker in markers:
        if isinstance(marker, Interval):
            parts = list(marker)
        else:
            parts = [marker] if isinstance(marker, Gt | Ge | Lt | Le) else []
        for part in parts:
            name = type(part).__name__.lower()
            bounds[name] = getattr(part, name)
    return Interval(**bounds)


def is_inside(value: Any, interval: Interval) -> bool:
    """Whether a number is in the interval."""
    low: Any = interval.gt, interval.ge
    high: Any = interval.lt, interval.le
    return (
        (low[0] is None or value > low[0])
        and (low[1] is None or value >= low[1])
        and (high[0] is None or value < high[0])
        and (high[1] is None or value <= high[1])
    )


def describe_interval(interval: Interval) -> str:
    """The interval in words, such as "at least 0 and below 1"; empty without bounds."""
    if interval.ge is not None and interval.le is not None:
        return f"between {interval.ge} and {interval.le}"
    words = []
    if interval.gt is not None:
        words.append(f"greater than {interval.gt}")
    if interval.ge is not None:
        has_end = interval.lt is not None
        words.append(f"at least {interval.ge}" if has_end else f"{interval.ge} or greater")
    if interval.lt is not None:
        words.append(f"below {interval.lt}")
    if interval.le is not None:
        words.append(f"at most {interval.le}")
    return " and ".join(words)
