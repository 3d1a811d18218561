"""`.txt`: a file is one document, or several with a separator between them."""

from collections.abc import Iterator
from dataclasses import replace

from data_tools.text.interface import (
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


def _read(
    file: InputFile, part: Slice, index: int, options: TextOptions, unit_bytes: int
) -> Iterator[Unit]:
    return read_stream(
        file,
        part,
        index,
        separator=_encode_separator(options),
        cuts_documents=options.cuts_documents,
        unit_bytes=unit_bytes,
    )


def _parse(unit: Unit, options: TextOptions) -> Iterator[Document | Problem]:
    separator = _encode_separator(options)
    texts = unit.data.split(separator) if separator else [unit.data]
    line = unit.first_line
    for index, text in enumerate(texts):
        is_first, is_last = index == 0, index == len(texts) - 1
        continues = unit.continues and is_first
        ends = unit.ends_document or not is_last
        if is_last and not text and not continues:
            break  # a separator may also follow the last document
        hashed = unit.document_hash if continues else hash_document(text)
        document = Document(text=text, ends=ends, hash=hashed if ends else 0)
        error = find_invalid_utf8(text)
        if error is not None:
            yield unit.name_problem(line + text.count(b"\n", 0, error), INVALID_UTF8)
            if continues and ends:  # the parts that earlier units have need an end
                yield replace(document, text=b"")
        else:
            yield document
        line += text.count(b"\n") + separator.count(b"\n")
    yield from unit.problems


def _encode_separator(options: TextOptions) -> bytes:
    return (options.document_separator or "").encode("utf-8")


PLAIN_TEXT = TextFormat(
    name="txt",
    suffixes=(".txt",),
    is_compressible=True,
    is_sliceable=False,
    read=_read,
    parse=_parse,
)
