"""The errors that users meet, each one line: what is wrong, where (file, key, value), the remedy.

Everything else that escapes from a command is a bug and shows its traceback.
"""

import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from megatron_eso.ranks import wait_for_first_rank


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

    Use it under `if __name__ == "__main__"`. argparse exits with 2 by itself. Ctrl-C, and a reader
    of stdout that has closed it (`| head`), end the process by the signal, without a traceback.

    Args:
        main: takes the arguments (None: those of the process), returns an exit code or None.
        argv: passed to `main`.
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
        # It may be of another pipe or socket, and then it is a bug.
        if not is_stdout_closed():
            raise
        end_by_signal(signal.SIGPIPE)
    sys.exit(code or 0)


def end_by_signal(number: signal.Signals) -> NoReturn:
    """End this process as the signal does by default; a shell sees 128 + number."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # where the signal is blocked


def is_stdout_closed() -> bool:
    """Return whether stdout is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))
