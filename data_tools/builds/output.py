"""Where a command writes: the directory that `--out` names."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_eso.command_line import quote
from megatron_eso.errors import ConfigError
from megatron_eso.files import is_taken, is_wrong_place, new_folder


def building_path(out: Path) -> Path:
    """Where `out` is written before it is complete."""
    return out.with_name(f"{out.name}.building")


def check_absent(out: Path) -> None:
    """Refuse a place that holds something.

    Raises:
        ConfigError: `out` exists and is no empty directory, or is no possible path.
    """
    with explain_place(out):
        if out.exists() and is_taken(out):
            raise ConfigError(f"--out {out} exists already; remove it or give another directory")


@contextlib.contextmanager
def explain_place(out: Path) -> Iterator[None]:
    """Name `--out` where the body cannot write there.

    Raises:
        ConfigError: The path leads nowhere, or the user may not write there.
    """
    try:
        yield
    except OSError as error:
        if not is_wrong_place(error):
            raise
        raise ConfigError(
            f"--out {quote(str(out))}: cannot be written ({error.strerror}); give another place"
        ) from None


@contextlib.contextmanager
def new_output(out: Path) -> Iterator[Path]:
    """Yield an empty directory to fill; it takes the name `out` at the end; see `new_folder`.

    Raises:
        ConfigError: `out` exists already, or nothing can be written there.
        UserError: another process is writing it.
    """
    check_absent(out)
    with contextlib.ExitStack() as stack:
        with explain_place(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            building = stack.enter_context(new_folder(out, building=building_path(out)))
        yield building
