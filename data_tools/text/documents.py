"""Units of work to documents."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import xxhash

from data_tools.text.inputs import TextOptions
from data_tools.text.problems import Problem
from data_tools.text.units import Unit
from megatron_eso.errors import DataError

_DECODER = json.JSONDecoder()
_INVALID_UTF8 = "invalid UTF-8; convert the file"


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A document, or a part of one that goes over several units."""

    text: bytes
    """In UTF-8."""
    ends: bool = True
    """False where it goes on in the next unit."""
    hash: int = 0
    """Of the whole document, where it ends."""


def parse_unit(unit: Unit, options: TextOptions, problems: list[Problem]) -> Iterator[Document]:
    """The documents of a unit, empty ones too.

    Args:
        unit: to parse.
        options: as the unit was read with.
        problems: receives what is left out, where `options.on_error` is "skip".

    Raises:
        DataError: something is wrong, where it is "stop"; the message names file and line.
    """
    parsers = {"jsonl": _parse_lines, "txt": _parse_text, "parquet": _parse_rows}
    for found in parsers[unit.kind](unit, options):
        if isinstance(found, Document):
            yield found
        elif options.on_error == "stop":
            raise DataError(found.describe())
        else:
            problems.append(found)


def hash_document(text: bytes) -> int:
    """The hash of a document's text, a 128-bit integer: for splits, and to know equal documents."""
    return xxhash.xxh3_128_intdigest(text)


def _parse_lines(unit: Unit, options: TextOptions) -> Iterator[Document | Problem]:
    for line, content in enumerate(_split_lines(unit.data), start=unit.first_line):
        try:
            record = _DECODER.decode(content)  # type: ignore[arg-type]
            text = record[options.text_key].encode("utf-8")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            wrong = _explain(content, options.text_key)
            if wrong is not None:
                yield _name_problem(unit, line, wrong)
        else:
            yield Document(text=text, hash=hash_document(text))
    yield from unit.problems


def _split_lines(data: bytes) -> list[str] | list[str | None]:
    """The lines; None for those in invalid UTF-8."""
    try:
        return data.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        lines = data.split(b"\n")
        return [None if _find_invalid_utf8(line) is not None else line.decode() for line in lines]


def _explain(line: str | None, text_key: str) -> str | None:
    """What is wrong with a line without text; None if it is blank."""
    if line is None:
        return _INVALID_UTF8
    if not line.strip():
        return None
    try:
        record = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        return f"invalid JSON ({error.msg}, column {error.colno}); mend the line"
    except (ValueError, RecursionError) as error:
        return f"invalid JSON ({error}); mend the line"
    if not isinstance(record, dict):
        return "not a JSON object; each line must be one"
    if text_key not in record:
        return f"no key {text_key!r}; name the key of the text by --text-key"
    if not isinstance(record[text_key], str):
        return f"{text_key!r} is not a string; name the key of the text by --text-key"
    return "the text holds half a surrogate pair; mend the line"


def _parse_text(unit: Unit, options: TextOptions) -> Iterator[Document | Problem]:
    separator = (options.document_separator or "").encode("utf-8")
    texts = unit.data.split(separator) if separator else [unit.data]
    line = unit.first_line
    for index, text in enumerate(texts):
        is_first, is_last = index == 0, index == len(texts) - 1
        continues = unit.continues and is_first
        ends = unit.ends_document or not is_last
        if is_last and not text and not continues:
            break  # nothing behind the last separator
        hashed = unit.document_hash if continues else hash_document(text)
        document = Document(text=text, ends=ends, hash=hashed if ends else 0)
        error = _find_invalid_utf8(text)
        if error is not None:
            yield _name_problem(unit, line + text.count(b"\n", 0, error), _INVALID_UTF8)
            if continues and ends:  # what was handed out of it has to end
                yield replace(document, text=b"")
        else:
            yield document
        line += text.count(b"\n") + separator.count(b"\n")
    yield from unit.problems


def _find_invalid_utf8(text: bytes) -> int | None:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return None


def _parse_rows(unit: Unit, options: TextOptions) -> Iterator[Document | Problem]:
    stop = 0
    for num_bytes in unit.row_bytes:
        start, stop = stop, stop + num_bytes
        text = unit.data[start:stop]
        yield Document(text=text, hash=hash_document(text))
    yield from unit.problems


def _name_problem(unit: Unit, line: int, what: str) -> Problem:
    return Problem(path=unit.path, line=line, what=what, start=unit.start)
