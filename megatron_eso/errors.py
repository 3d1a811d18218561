"""The errors that users can correct: one line with the fault, file, key, value and remedy.

Any other exception of a command is a bug and shows its traceback.
"""

import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from megatron_eso.ranks import wait_for_first_rank


class UserError(Exception):
    """An error that the user can correct, in one line; a command ends with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        """Put `message` on one line, because it may quote text of other libraries."""
        super().__init__(" ".join(message.split()))


class ConfigError(UserError):
    """A wrong command line or configuration."""

    exit_code = 2


class DataError(UserError):
    """Shards, tokenizers or text are missing, damaged or do not fit."""


class OutageError(DataError):
    """Remote storage does not answer; nothing has to be corrected, and a later job may succeed."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or does not fit."""


class TrainingError(UserError):
    """Training cannot continue."""


def report_error(error: UserError) -> None:
    """Print `error: <line>` to stderr."""
    sys.stderr.write(f"error: {error}\n")


def run_command(
    main: Callable[[list[str] | None], int | None], argv: list[str] | None = None
) -> NoReturn:
    """Run a command's `main` and exit with its return value, or with the code of its UserError.

    Use it under `if __name__ == "__main__"`. argparse itself exits with 2. Ctrl-C, or a closed
    reader of stdout (`| head`), ends the process by the signal, without a traceback.

    Args:
        main: The command: it takes the arguments and returns an exit code or None.
        argv: The arguments for `main`; None: those of the process.
    """
    try:
        code = main(argv)
        sys.stdout.flush()
    except UserError as error:
        wait_for_first_rank()
        report_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        end_by_signal(signal.SIGINT)
    except BrokenPipeError:
        # The error of another pipe or socket is a bug.
        if not is_stdout_closed():
            raise
        end_by_signal(signal.SIGPIPE)
    sys.exit(code or 0)


def end_by_signal(number: signal.Signals) -> NoReturn:
    """End this process by the default action of a signal; a shell reports 128 + number."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # if the signal is blocked


def is_stdout_closed() -> bool:
    """Return whether stdout is a pipe without a reader."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))
