"""The table of token formats of other programs; a new one is a file and a line below."""

from data_tools.imports.interface import TokenFiles, TokenFormat
from data_tools.imports.litdata import LITDATA
from data_tools.imports.megatron import MEGATRON
from data_tools.imports.packed import PACKED
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.errors import ConfigError

# The first format with the name of `--from` that recognizes an input is used.
FORMATS = (
    MEGATRON,
    LITDATA,
    PACKED,
)

OPTIONS = tuple(dict.fromkeys(each.option for each in FORMATS))
"""Values of `--from`."""


def open_files(option: str, inputs: list[str], tokenizer: Tokenizer) -> TokenFiles:
    """Open the input, and check headers and sizes of all its files.

    Args:
        option: Value of `--from`.
        inputs: Values of `--input`.
        tokenizer: The tokenizer that made the tokens.

    Raises:
        ConfigError: A file is missing, or the inputs are of several formats.
        DataError: A file is damaged or of another kind.
    """
    found = list(dict.fromkeys(_recognize(option, text) for text in inputs))
    if len(found) > 1:
        labels = " and ".join(each.label for each in FORMATS if each in found)
        raise ConfigError(f"--input: {labels} are mixed; import them one after the other")
    return found[0].open(inputs, tokenizer)


def describe_formats() -> str:
    """Return the formats and their inputs, for the help of the command line."""
    lines = (
        f"{option}: {', or '.join(each.help for each in FORMATS if each.option == option)}"
        for option in OPTIONS
    )
    return "; ".join(lines)


def _recognize(option: str, text: str) -> TokenFormat:
    return next(each for each in FORMATS if each.option == option and each.recognizes(text))
