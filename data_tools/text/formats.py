"""The formats of text files: a new one is a file like the others here, and a line of the table."""

from pathlib import Path

from data_tools.text.compression import SUFFIXES
from data_tools.text.interface import TextFormat
from data_tools.text.jsonl import JSONL
from data_tools.text.parquet import PARQUET
from data_tools.text.plain_text import PLAIN_TEXT

FORMATS = {
    JSONL.name: JSONL,
    PLAIN_TEXT.name: PLAIN_TEXT,
    PARQUET.name: PARQUET,
}

STANDARD_INPUT_FORMAT = JSONL


def find_format(path: Path) -> TextFormat | None:
    """The format of a file by its suffixes; None if it has none of these."""
    is_compressed = path.suffix in SUFFIXES
    suffix = path.with_suffix("").suffix if is_compressed else path.suffix
    for each in FORMATS.values():
        if suffix in each.suffixes and (each.is_compressible or not is_compressed):
            return each
    return None


def list_suffixes() -> str:
    """The suffixes of all formats, for messages."""
    compressible = ", ".join(_join_suffixes(is_compressible=True))
    others = ", ".join(_join_suffixes(is_compressible=False))
    return f"{compressible} (each also {', '.join(SUFFIXES)}) and {others}"


def _join_suffixes(*, is_compressible: bool) -> list[str]:
    chosen = [each for each in FORMATS.values() if each.is_compressible == is_compressible]
    return [suffix for each in chosen for suffix in each.suffixes]
