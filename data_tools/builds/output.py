"""Where a command writes: the directory that `--out` names."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_eso.errors import ConfigError
from megatron_eso.files import is_taken, new_folder


def building_path(out: Path) -> Path:
    """Where `out` is written before it is complete."""
    return out.with_name(f"{out.name}.building")


def check_absent(out: Path) -> None:
    """Refuse a place that holds something.

    Raises:
        ConfigError: `out` exists and is no empty directory.
    """
    if is_taken(out):
        raise ConfigError(f"--out {out} exists already; remove it or give another directory")


@contextlib.contextmanager
def new_output(out: Path) -> Iterator[Path]:
    """Yield an empty directory to fill; it takes the name `out` at the end; see `new_folder`.

    Raises:
        ConfigError: `out` exists already.
        UserError: another process is writing it.
    """
    check_absent(out)
    with new_folder(out, building=building_path(out)) as building:
        yield building
