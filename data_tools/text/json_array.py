"""`.json`: one array of objects, each of them a document; read as a stream, as lines of JSONL."""

import codecs
import dataclasses
import json
from collections.abc import Iterator

from data_tools.text.interface import (
    Document,
    InputFile,
    Slice,
    SourceRead,
    TextFormat,
    TextOptions,
    Unit,
)
from data_tools.text.jsonl import JSONL
from data_tools.text.problems import INVALID_UTF8, Problem
from data_tools.text.streams import SliceText, open_input
from megatron_eso.compression import DamageError, decompress

_DECODER = json.JSONDecoder()
_SPACE = " \t\n\r"
_BLOCK_BYTES = 2**20


class _BrokenArrayError(Exception):
    """The file does not go on as an array; the message is for the user."""


def begins_array(file: InputFile) -> bool:
    """Whether the first character of a file opens an array; False where it cannot be read."""
    assert file.path is not None
    try:
        with file.path.open("rb") as stream:
            raw = iter(lambda: stream.read(_BLOCK_BYTES), b"")
            blocks = decompress(raw, file.compression) if file.compression else raw
            for block in blocks:
                text = block.removeprefix(codecs.BOM_UTF8).lstrip()
                if text:
                    return text.startswith(b"[")
    except (OSError, DamageError):
        return False  # reading the file reports it
    return False


def _read(
    file: InputFile, part: Slice, index: int, options: TextOptions, unit_bytes: int
) -> Iterator[Unit]:
    """Yield the elements, a line each."""
    with open_input(file) as stream:
        text = SliceText(file, part, stream)
        problems: tuple[Problem, ...] = ()
        lines, first, number, size, done = list[bytes](), 1, 0, 0, 0
        try:
            for element in _split_elements(text):
                lines.append(element)
                number += 1
                size += len(element)
                if size >= unit_bytes:
                    yield _make_unit(file, index, lines, first, raw_bytes=text.num_bytes - done)
                    lines, first, size, done = [], number + 1, 0, text.num_bytes
        except (_BrokenArrayError, UnicodeDecodeError) as error:
            what = INVALID_UTF8 if isinstance(error, UnicodeDecodeError) else str(error)
            problems = (Problem(path=file.label, line=number + 1, what=what, is_row=True),)
        if text.damage is not None:
            problems = (Problem(path=file.label, line=0, what=text.damage),)
        last = _make_unit(file, index, lines, first, raw_bytes=text.num_bytes - done)
        source = SourceRead(num_bytes=text.num_bytes, sha256=text.sha256())
        yield dataclasses.replace(last, source=source, problems=problems)


def _make_unit(
    file: InputFile, index: int, lines: list[bytes], first: int, *, raw_bytes: int
) -> Unit:
    return Unit(
        slice=index,
        path=file.label,
        kind=file.kind,
        data=b"\n".join(lines),
        first_line=first,
        raw_bytes=raw_bytes,
    )


def _split_elements(text: SliceText) -> Iterator[bytes]:
    """Yield the elements of the array as JSON on one line.

    The rest of a broken file is read all the same: the hash is that of the whole.

    Raises:
        _BrokenArrayError: It is no array, or does not go on as one.
        UnicodeDecodeError: It is no UTF-8.
    """
    blocks = text.read_blocks(_BLOCK_BYTES)
    try:
        yield from _split_blocks(blocks)
    finally:
        for _ in blocks:
            pass


def _split_blocks(blocks: Iterator[tuple[bytes, bool]]) -> Iterator[bytes]:
    decode = codecs.getincrementaldecoder("utf-8")().decode
    pending, wanted = "", 0
    is_open = is_closed = needs_comma = False
    for block, is_last in blocks:
        pending += decode(block, is_last)
        if len(pending) < wanted and not is_last:
            continue
        place = 0
        while True:
            place = _skip_space(pending, place)
            character = pending[place : place + 1]
            if not character:
                break
            if is_closed:
                _expect(False, "more text after the array")
            elif not is_open:
                _expect(character == "[", "no array")
                is_open, place = True, place + 1
            elif character == "]":
                is_closed, place = True, place + 1
            elif needs_comma:
                _expect(character == ",", "no comma between two objects")
                needs_comma, place = False, place + 1
            else:
                found = _find_end(pending, place, is_last)
                if found is None:
                    break
                yield pending[place:found].replace("\n", " ").encode("utf-8")
                needs_comma, place = True, found
        pending = pending[place:]
        # An element that is longer than a block is decoded a few times, and not for each block.
        wanted = 2 * len(pending)
    _expect(is_closed, "the array has no end")


def _find_end(text: str, place: int, is_last: bool) -> int | None:
    """Return where the element ends; None where more text is needed to say so."""
    try:
        _, end = _DECODER.raw_decode(text, place)
    except json.JSONDecodeError as error:
        if is_last:
            _expect(False, f"invalid JSON ({error.msg})")
        return None
    except RecursionError:
        raise _BrokenArrayError("invalid JSON (nested too deeply); correct the file") from None
    return end if end < len(text) or is_last else None


def _skip_space(text: str, place: int) -> int:
    while text[place : place + 1] in tuple(_SPACE):
        place += 1
    return place


def _expect(is_right: bool, what: str) -> None:
    if not is_right:
        raise _BrokenArrayError(f"{what}: an array of objects was expected; correct the file")


def _parse(unit: Unit, options: TextOptions) -> Iterator[Document | Problem]:
    for found in JSONL.parse(unit, options):
        yield dataclasses.replace(found, is_row=True) if isinstance(found, Problem) else found


JSON_ARRAY = TextFormat(
    name="json",
    suffixes=(".json",),
    is_compressible=True,
    is_sliceable=False,
    read=_read,
    parse=_parse,
)
