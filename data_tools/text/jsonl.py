"""`.jsonl`: one document per line, under the text key."""

import json
from collections.abc import Iterator

from data_tools.text.interface import (
    STANDARD_INPUT_LABEL,
    Document,
    InputFile,
    Slice,
    TextFormat,
    TextOptions,
    Unit,
    hash_document,
)
from data_tools.text.problems import INVALID_UTF8, Problem, find_invalid_utf8
from data_tools.text.streams import read_stream

_DECODER = json.JSONDecoder()
_SKIP = "or leave out broken lines by --on-error skip"
_REMEDY = f"correct the line (JSONL was expected, one object a line), {_SKIP}"
_STANDARD_INPUT_REMEDY = f"name the format by --format (JSONL was expected), {_SKIP}"


def _read(
    file: InputFile, part: Slice, index: int, options: TextOptions, unit_bytes: int
) -> Iterator[Unit]:
    return read_stream(file, part, index, separator=b"\n", unit_bytes=unit_bytes)


def _parse(unit: Unit, options: TextOptions) -> Iterator[Document | Problem]:
    for line, content in enumerate(_split_lines(unit.data), start=unit.first_line):
        try:
            record = _DECODER.decode(content)  # type: ignore[arg-type]
            text = record[options.text_key].encode("utf-8")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            is_named = unit.path != STANDARD_INPUT_LABEL
            remedy = _REMEDY if is_named else _STANDARD_INPUT_REMEDY
            wrong = _explain(content, options.text_key, remedy)
            if wrong is not None:
                yield unit.name_problem(line, wrong)
        else:
            yield Document(text=text, hash=hash_document(text))
    yield from unit.problems


def _split_lines(data: bytes) -> list[str] | list[str | None]:
    """Return the lines; None for each line of invalid UTF-8."""
    try:
        return data.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        lines = data.split(b"\n")
        return [None if find_invalid_utf8(line) is not None else line.decode() for line in lines]


def _explain(line: str | None, text_key: str, remedy: str) -> str | None:
    """Describe what is wrong with a line without text; None for a blank line."""
    if line is None:
        return INVALID_UTF8
    if not line.strip():
        return None
    try:
        record = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        return f"invalid JSON ({error.msg}, column {error.colno}); {remedy}"
    except (ValueError, RecursionError) as error:
        return f"invalid JSON ({error}); {remedy}"
    if not isinstance(record, dict):
        return "is not a JSON object; each line must be one"
    if text_key not in record:
        return f"no key {text_key!r}; name the key of the text by --text-key"
    if not isinstance(record[text_key], str):
        return f"{text_key!r} is not a string; name the key of the text by --text-key"
    return "the text holds half a surrogate pair; correct the line"


JSONL = TextFormat(
    name="jsonl",
    suffixes=(".jsonl", ".ndjson"),
    is_compressible=True,
    is_sliceable=True,
    read=_read,
    parse=_parse,
)
