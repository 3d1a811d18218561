"""Sizes, durations and counts as text."""

import math

MIB = 2**20
GIB = 2**30


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds: `1:02:03`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def format_gib(num_bytes: float) -> str:
    """A size of memory or disk in GiB (2^30 bytes), three digits: `1.25 GiB`."""
    return f"{num_bytes / GIB:.3g} GiB"


def format_mb(num_bytes: float) -> str:
    """An amount of data in MB (10^6 bytes): `12.5 MB`."""
    return f"{num_bytes / 1e6:.1f} MB"


def parse_count(text: str) -> int:
    """A whole number that is not negative; `1e9` is one.

    Raises:
        ValueError: The text is no such number.
    """
    value = float(text)
    if not 0 <= value < math.inf or value != int(value):
        raise ValueError(f"{text} is no count")
    return int(text) if text.isdecimal() else int(value)
