"""Sizes, durations and counts as text."""

import math

MIB = 2**20
GIB = 2**30


def format_seconds(seconds: float) -> str:
    """Format a duration as hours, minutes and seconds: `1:02:03`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def format_gib(num_bytes: float) -> str:
    """Format a size of memory or disk in GiB (2^30 bytes) with three digits: `1.25 GiB`."""
    return f"{num_bytes / GIB:.3g} GiB"


def format_mb(num_bytes: float) -> str:
    """Format an amount of data in MB (10^6 bytes): `12.5 MB`."""
    return f"{num_bytes / 1e6:.1f} MB"


def format_count(number: int, noun: str) -> str:
    """Return a number of things, such as "1 shard" or "2 shards"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def parse_count(text: str) -> int:
    """Parse a whole number of 0 or more, such as `1000` or `1e3`.

    Raises:
        ValueError: The text is another number or none.
    """
    value = float(text)
    if not 0 <= value < math.inf or value != int(value):
        raise ValueError(f"{text} is not a count")
    return int(text) if text.isdecimal() else int(value)
