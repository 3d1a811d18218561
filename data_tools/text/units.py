"""Reads spans of the input as units of about 1 MiB of text, and parses units to documents.

The cuts depend on the bytes of the files alone: not on interruptions, and not on the number of
processes. So the number of units states how much of a span has been read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import xxhash

from data_tools.text.formats import FORMATS
from data_tools.text.interface import Document, InputFile, TextOptions, Unit
from data_tools.text.problems import Problem
from data_tools.text.spans import Span
from megatron_eso.errors import DataError

UNIT_BYTES = 2**20


def read_units(
    files: Sequence[InputFile],
    span: Span,
    options: TextOptions,
    *,
    skip_units: int = 0,
    skipped_digest: int | None = None,
    unit_bytes: int = UNIT_BYTES,
) -> Iterator[Unit]:
    """Read a span as units; every slice, even an empty one, ends with a unit that has its `source`.

    Args:
        files: All files of the input.
        span: The span to read.
        options: How documents lie in the files.
        skip_units: Number of units to read without yielding them.
        skipped_digest: `Unit.digest` of the last of these, which shows that the input is the same.
        unit_bytes: Size of a unit; a line, or a document that is not cut, may make it longer.

    Raises:
        DataError: A file cannot be read, or has changed.
    """
    digest = xxhash.xxh3_64()
    number = 0
    for index, part in enumerate(span.slices):
        file = files[part.file]
        try:
            for unit in FORMATS[file.kind].read(file, part, index, options, unit_bytes):
                digest.update(unit.data)
                number += 1
                if number > skip_units:
                    yield replace(unit, number=number - 1, digest=digest.intdigest())
                elif number == skip_units:
                    _check_skipped(file, digest.intdigest(), skipped_digest)
        except OSError as error:
            raise DataError(
                f"cannot read {file.label}: {error.strerror or error}; repair it or leave it out"
            ) from error
    if number < skip_units:
        _check_skipped(files[span.slices[-1].file], None, skipped_digest)


def parse_unit(unit: Unit, options: TextOptions, problems: list[Problem]) -> Iterator[Document]:
    """Yield the documents of a unit, also empty ones.

    Args:
        unit: The unit to parse.
        options: The options with which the unit was read.
        problems: Receives the problems if `options.on_error` is "skip".

    Raises:
        DataError: The unit has a problem and `options.on_error` is "stop"; the message names file
            and line.
    """
    for found in FORMATS[unit.kind].parse(unit, options):
        if isinstance(found, Document):
            yield found
        elif options.on_error == "stop":
            raise DataError(found.describe())
        else:
            problems.append(found)


def _check_skipped(file: InputFile, digest: int | None, expected: int | None) -> None:
    if expected is not None and digest != expected:
        raise DataError(
            f"{file.label}, or a file read before it, has changed since the build was interrupted; "
            "restore it, or build in another directory"
        )
