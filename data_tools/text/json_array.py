"""`.json`: one array of objects, each a document; streamed as lines of JSONL."""

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
    """Error of a file that is not a whole array of objects; the message is for the user."""


def begins_array(file: InputFile) -> bool:
    """Return whether the first character of a file opens an array; False if it is unreadable."""
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
        return False  # reading the file reports the error
    return False


def _read(
    file: InputFile, part: Slice, index: int, options: TextOptions, unit_bytes: int
) -> Iterator[Unit]:
    """Yield the elements as units of one line each."""
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
    """Yield the elements of the array, each as JSON on one line.

    A broken file is read to its end, so that its hash is that of the whole file.

    Raises:
        _BrokenArrayError: The file is not a whole array.
        UnicodeDecodeError: The file is not UTF-8.
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
        # Text is collected until the element in it may be complete.
        pending += decode(block, is_last)
        if len(pending) < wanted and not is_last:
            continue
        # The whole elements of the text, and the characters between them.
        position = 0
        while True:
            position = _skip_space(pending, position)
            character = pending[position : position + 1]
            if not character:
                break
            if is_closed:
                _expect(False, "more text after the array")
            elif not is_open:
                _expect(character == "[", "no array")
                is_open, position = True, position + 1
            elif character == "]":
                is_closed, position = True, position + 1
            elif needs_comma:
                _expect(character == ",", "no comma between two objects")
                needs_comma, position = False, position + 1
            else:
                found = _find_end(pending, position, is_last)
                if found is None:
                    break
                yield pending[position:found].replace("\n", " ").encode("utf-8")
                needs_comma, position = True, found
        pending = pending[position:]
        # A long element is decoded again when the text has doubled, and not at each block.
        wanted = 2 * len(pending)
    _expect(is_closed, "the array has no end")


def _find_end(text: str, position: int, is_last: bool) -> int | None:
    """Return the end of the element; None if it may be in later text."""
    try:
        _, end = _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        if is_last:
            _expect(False, f"invalid JSON ({error.msg})")
        return None
    except RecursionError:
        raise _BrokenArrayError("invalid JSON (nested too deeply); correct the file") from None
    return end if end < len(text) or is_last else None


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in tuple(_SPACE):
        position += 1
    return position


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
