"""The table of text formats; a new format is a file like the others here and a line below."""

from dataclasses import replace
from pathlib import Path

from data_tools.text.interface import InputFile, TextFormat
from data_tools.text.json_array import JSON_ARRAY, begins_array
from data_tools.text.jsonl import JSONL
from data_tools.text.parquet import PARQUET
from data_tools.text.plain_text import PLAIN_TEXT
from megatron_eso.compression import SUFFIXES

FORMATS = {
    JSONL.name: JSONL,
    JSON_ARRAY.name: JSON_ARRAY,
    PLAIN_TEXT.name: PLAIN_TEXT,
    PARQUET.name: PARQUET,
}

STANDARD_INPUT_FORMATS = (JSONL.name, JSON_ARRAY.name, PLAIN_TEXT.name)
"""Formats of standard input; the first one is the default."""


def find_format(path: Path) -> TextFormat | None:
    """Return the format of a file by its suffixes; None for unknown ones."""
    is_compressed = path.suffix in SUFFIXES
    suffix = path.with_suffix("").suffix if is_compressed else path.suffix
    for each in FORMATS.values():
        if suffix in each.suffixes and (each.is_compressible or not is_compressed):
            return each
    return None


def look_into(file: InputFile) -> InputFile:
    """Return a file with the kind of its content: a `.json` file that is not an array is JSONL."""
    if file.kind != JSON_ARRAY.name or begins_array(file):
        return file
    return replace(file, kind=JSONL.name)


def list_suffixes() -> str:
    """Return the suffixes of all formats, for messages."""
    compressible = ", ".join(_join_suffixes(is_compressible=True))
    others = ", ".join(_join_suffixes(is_compressible=False))
    return f"{compressible} (each also {', '.join(SUFFIXES)}) and {others}"


def _join_suffixes(*, is_compressible: bool) -> list[str]:
    chosen = [each for each in FORMATS.values() if each.is_compressible == is_compressible]
    return [suffix for each in chosen for suffix in each.suffixes]
