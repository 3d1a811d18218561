"""`python -m data_tools`: makes tokenizers and token shards from text, and inspects them."""

from data_tools.reading_commands import add_reading_commands
from data_tools.writing_commands import add_writing_commands
from megatron_eso.command_line import CommandLine
from megatron_eso.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """Run a subcommand.

    Raises:
        ConfigError: The command line is wrong, or does not fit the files that it names.
        DataError: Text, tokenizer or shards are missing or damaged.
    """
    parser = CommandLine(
        prog="python -m data_tools",
        description="Makes tokenizers and token shards from text, and inspects them.",
    )
    # Each module adds the arguments of its commands and the functions that run them.
    commands = parser.add_subparsers(dest="command", required=True)
    add_writing_commands(commands)
    add_reading_commands(commands)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    run_command(main)
