"""The directory that `--out` names: its checks, and its name while it is written."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_eso.command_line import quote
from megatron_eso.errors import ConfigError
from megatron_eso.files import is_taken, is_wrong_path, new_folder


def building_path(out: Path) -> Path:
    """Return the path at which `out` is written until it is complete."""
    return out.with_name(f"{out.name}.building")


def check_absent(out: Path) -> None:
    """Refuse an output path that is taken.

    Raises:
        ConfigError: `out` exists and is not an empty directory, or is not a possible path.
    """
    with explain_path(out):
        if out.exists() and is_taken(out):
            raise ConfigError(f"--out {out} exists already; remove it or give another directory")


@contextlib.contextmanager
def explain_path(out: Path) -> Iterator[None]:
    """Turn errors of the body about a path that cannot be written into one about `--out`.

    Raises:
        ConfigError: The path is impossible, or the user may not write to it.
    """
    try:
        yield
    except OSError as error:
        if not is_wrong_path(error):
            raise
        raise ConfigError(
            f"--out {quote(str(out))}: cannot be written ({error.strerror}); give another path"
        ) from None


@contextlib.contextmanager
def new_output(out: Path) -> Iterator[Path]:
    """Yield an empty directory to fill, which is renamed to `out` at the end; see `new_folder`.

    Raises:
        ConfigError: `out` exists already, or cannot be written.
        UserError: Another process is writing it.
    """
    check_absent(out)
    with contextlib.ExitStack() as stack:
        with explain_path(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            building = stack.enter_context(new_folder(out, building=building_path(out)))
        yield building
