"""The foreign formats of token files: a new one is a file like the others, and a line below."""

from data_tools.imports.interface import TokenFiles, TokenFormat
from data_tools.imports.litdata import LITDATA
from data_tools.imports.megatron import MEGATRON
from data_tools.imports.packed import PACKED
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.errors import ConfigError

# Of formats with one name, the first that recognizes an input counts.
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
        option: value of `--from`.
        inputs: values of `--input`.
        tokenizer: the one with which the tokens were made.

    Raises:
        ConfigError: a file is missing, or the inputs are of several formats.
        DataError: a file is damaged or of another kind.
    """
    found = list(dict.fromkeys(_recognize(option, text) for text in inputs))
    if len(found) > 1:
        labels = " and ".join(each.label for each in FORMATS if each in found)
        raise ConfigError(f"--input: {labels} are mixed; import each")
    return found[0].open(inputs, tokenizer)


def describe_formats() -> str:
    """The formats and their inputs, for the help of the command line."""
    lines = (
        f"{option}: {', or '.join(each.help for each in FORMATS if each.option == option)}"
        for option in OPTIONS
    )
    return "; ".join(lines)


def _recognize(option: str, text: str) -> TokenFormat:
    return next(each for each in FORMATS if each.option == option and each.recognizes(text))
