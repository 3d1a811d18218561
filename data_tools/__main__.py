"""`python -m data_tools`: text to tokenizers and token shards, and looking at them."""

from data_tools.reading_commands import add_reading_commands
from data_tools.writing_commands import add_writing_commands
from megatron_eso.command_line import CommandLine
from megatron_eso.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """Run a subcommand.

    Raises:
        ConfigError: the command line does not fit what is on the disk.
        DataError: text, tokenizer or shards are missing or damaged.
    """
    parser = CommandLine(
        prog="python -m data_tools",
        description="Text to tokenizers and token shards, and looking at them.",
    )
    # A module for each kind of command: it adds their arguments and the function that runs them.
    commands = parser.add_subparsers(dest="command", required=True)
    add_writing_commands(commands)
    add_reading_commands(commands)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    run_command(main)
