"""The errors that users meet, each one line: what is wrong, where (file, key, value), the remedy.

Everything else that escapes from a command is a bug and shows its traceback.
"""

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something that the user can correct, in one line; a command ends with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        """Keep `message` on one line, whatever text of another library it quotes."""
        super().__init__(" ".join(message.split()))


class ConfigError(UserError):
    """A wrong command line or configuration."""

    exit_code = 2


class DataError(UserError):
    """Shards, tokenizers or text that are missing, damaged or do not fit."""


class CheckpointError(UserError):
    """Checkpoints that are missing, damaged or do not fit."""


class TrainingError(UserError):
    """Training that cannot go on."""


def report_error(error: UserError) -> None:
    """Print `error: <line>` to stderr."""
    sys.stderr.write(f"error: {error}\n")


def run_command(
    main: Callable[[list[str] | None], int | None], argv: list[str] | None = None
) -> NoReturn:
    """Run a command's `main` and exit with what it returns, or with the code of its UserError.

    Use it under `if __name__ == "__main__"`. argparse exits with 2 by itself.

    Args:
        main: takes the arguments (None: those of the process), returns an exit code or None.
        argv: passed to `main`.
    """
    try:
        code = main(argv)
    except UserError as error:
        report_error(error)
        sys.exit(error.exit_code)
    sys.exit(code or 0)
