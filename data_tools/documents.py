"""Text files to documents: finding the inputs, cutting them into units of work, parsing a unit.

A `.jsonl` file holds a document per line, under the text key; a `.txt` file is one document. The
cuts depend on the files alone, never on how many processes work on them.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import xxhash

from megatron_eso.data.tokenizer import split_segments
from megatron_eso.errors import ConfigError, DataError

Kind = Literal["jsonl", "txt"]

_KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".txt": "txt"}
_UNIT_BYTES = 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFile:
    """A file to read documents from."""

    path: Path
    name: str
    """Path relative to the input that named it; goes into the manifest."""
    kind: Kind
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A piece of work: some lines of a JSONL file, or a text file or a part of one."""

    file: int
    """Number of the input file."""
    path: str
    kind: Kind
    data: bytes
    first_line: int
    """Number of the first line in the file, from 1."""
    ends_document: bool = True
    """False where a text file goes on in the next unit."""
    document_hash: int = 0
    """Of the text file's document, where the caller asked for it."""


@dataclass(slots=True)
class ReadFile:
    """What reading a file has found, complete once all its units are taken."""

    num_bytes: int = 0
    sha256: "hashlib._Hash" = field(default_factory=hashlib.sha256)


def find_inputs(paths: Sequence[str]) -> list[InputFile]:
    """The input files in order: as given, folders searched through in the order of their paths.

    Raises:
        ConfigError: a path is missing, of an unknown kind, or a folder without text.
        DataError: a file is empty.
    """
    inputs: list[InputFile] = []
    for text in paths:
        path = Path(text)
        if path.is_dir():
            found = sorted(
                (file.relative_to(path).as_posix(), file)
                for file in path.rglob("*")
                if file.suffix in _KINDS and file.is_file()
            )
            if not found:
                raise ConfigError(
                    f"--input {text}: the folder holds no {' or '.join(_KINDS)} files"
                )
            inputs.extend(_describe_input(file, name) for name, file in found)
        elif not path.is_file():
            raise ConfigError(f"--input {text}: there is no such file or folder")
        elif path.suffix not in _KINDS:
            raise ConfigError(
                f"--input {text}: unknown kind of file; give {' or '.join(_KINDS)} files"
            )
        else:
            inputs.append(_describe_input(path, path.name))
    return inputs


def read_units(
    file: InputFile, number: int, found: ReadFile, *, cut_text: bool, hash_text: bool
) -> Iterator[Unit]:
    """Cut a file into units of about 1 MiB.

    Args:
        file: to read.
        number: of the file, for the units.
        found: receives size and sha256 of what was read.
        cut_text: cut long text files after newlines, else each is one unit.
        hash_text: give the units of a text file the hash of the whole.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        document_hash = 0
        if hash_text and file.kind == "txt":
            document_hash = _hash_text_file(file.path)
        with file.path.open("rb", buffering=0) as stream:
            first_line = 1
            for data, is_last in _cut_stream(stream, file.kind, found, cut_text):
                yield Unit(
                    file=number,
                    path=str(file.path),
                    kind=file.kind,
                    data=data,
                    first_line=first_line,
                    ends_document=is_last or file.kind == "jsonl",
                    document_hash=document_hash,
                )
                first_line += data.count(b"\n")
    except OSError as error:
        raise DataError(
            f"cannot read {file.path}: {error.strerror}; mend or leave it out"
        ) from error


def parse_unit(unit: Unit, text_key: str) -> Iterator[bytes]:
    """The documents of a unit in UTF-8, or for a text file the part of its document.

    Raises:
        DataError: a line that is no document; the message names file and line.
    """
    if unit.kind == "txt":
        try:
            unit.data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = unit.first_line + unit.data.count(b"\n", 0, error.start)
            raise DataError(f"{unit.path}:{line}: invalid UTF-8; convert the file") from error
        yield unit.data
        return
    data = unit.data
    if unit.first_line == 1:
        data = data.removeprefix(_BYTE_ORDER_MARK)
    for line, content in enumerate(data.split(b"\n"), start=unit.first_line):
        if content.strip():
            yield _parse_line(content, f"{unit.path}:{line}", text_key)


def hash_document(text: bytes) -> int:
    """The hash that decides a document's split, a 64-bit integer."""
    return xxhash.xxh3_64_intdigest(text)


def _describe_input(path: Path, name: str) -> InputFile:
    num_bytes = path.stat().st_size
    if not num_bytes:
        raise DataError(f"{path} is empty; leave it out")
    return InputFile(path=path, name=name, kind=_KINDS[path.suffix], num_bytes=num_bytes)


def _parse_line(content: bytes, where: str, text_key: str) -> bytes:
    try:
        record = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: invalid UTF-8; convert the file") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: invalid JSON ({error}); mend the line") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: not a JSON object; each line must be one")
    text = record.get(text_key)
    if not isinstance(text, str):
        problem = f"{text_key!r} is not a string" if text_key in record else f"no key {text_key!r}"
        raise DataError(f"{where}: {problem}; name the key of the text by --text-key")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the text holds half a surrogate pair; mend the line") from error


def _cut_stream(
    stream: BinaryIO, kind: Kind, found: ReadFile, cut_text: bool
) -> Iterator[tuple[bytes, bool]]:
    """Yield pieces cut at line ends (JSONL) or segment ends (text), and whether it is the last."""
    pending = bytearray()
    cuts = kind == "jsonl" or cut_text
    while piece := stream.read(_UNIT_BYTES):
        found.num_bytes += len(piece)
        found.sha256.update(piece)
        pending += piece
        # What is left over is not the file's last byte, so that the last piece is known as such.
        stop = _find_cut(pending, kind) if cuts and len(pending) > _UNIT_BYTES else 0
        if 0 < stop < len(pending):
            yield bytes(pending[:stop]), False
            del pending[:stop]
    if pending:
        yield bytes(pending), True


def _find_cut(pending: bytearray, kind: Kind) -> int:
    if kind == "jsonl":
        return pending.rfind(b"\n") + 1
    segments = list(split_segments(bytes(pending)))
    return len(pending) - len(segments[-1])


def _hash_text_file(path: Path) -> int:
    digest = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as stream:
        while piece := stream.read(_UNIT_BYTES):
            digest.update(piece)
    return digest.intdigest()
