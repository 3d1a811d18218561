"""The newest values in `metrics.jsonl`, read without reading the whole file."""

import json
from pathlib import Path

_TAIL_BYTES = 64 * 1024


def read_recent_metrics(path: Path) -> dict[str, float]:
    """Read the newest value of each tag in the last 64 KiB; empty where there is no file.

    Lines of steps and of validations alternate, so that no single line has every tag.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return {}
    values: dict[str, float] = {}
    for line in lines:
        try:
            # A value that is not finite is text there.
            values |= {key: float(value) for key, value in json.loads(line).items()}
        except (ValueError, TypeError, AttributeError):  # cut by the window, or being written
            continue
    return values
